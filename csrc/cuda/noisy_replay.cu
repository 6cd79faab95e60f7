// ARREST's noisy replay in CUDA C++. Definition: fastadv/ops/noisy_replay.py.
//
// Beside a Triton version, for the reason in random_start.cu. A block belongs to one sample, so
// each sample reads one of its two images, not both.
#include "cuda/noise.cuh"

namespace fastadv::cuda {
namespace {

template <class T, int kPlanes>
__global__ void __launch_bounds__(kNoiseThreads) replay(Replay r, unsigned blocks_per_sample) {
  using C = Compute<T>;
  const Noise& n = r.noise;
  const Place place(n, blocks_per_sample);
  const int64_t start = place.row * n.size;
  T* out = static_cast<T*>(n.out) + start;
  if (number_of(r.distance, place.row) > r.tau) {
    const AddNoise<C, Ball::kLinf> noise{C(number_of(n.eps, place.row)), C(n.low), C(n.high)};
    Share<T, kPlanes>::apply(out, static_cast<const T*>(n.x) + start, place.index, n, place.key,
                             noise);
  } else {
    Share<T, kPlanes>::copy(out, static_cast<const T*>(r.adv) + start, place.index, n);
  }
}

}  // namespace

cudaError_t launch_noisy_replay(const Replay& r, cudaStream_t stream) {
  const Noise& n = r.noise;
  if (n.batch * n.size == 0) return cudaSuccess;
  return dispatch_share(n, r.adv, [&](auto t, auto planes) {
    using T = typename decltype(t)::type;
    const int64_t per_sample = Share<T, planes.value>::blocks_per_sample(n);
    replay<T, planes.value>
        <<<unsigned(n.batch * per_sample), kNoiseThreads, 0, stream>>>(r, unsigned(per_sample));
    return cudaGetLastError();
  });
}

}  // namespace fastadv::cuda
