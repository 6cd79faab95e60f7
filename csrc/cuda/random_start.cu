// Uniform noise in the eps-ball in CUDA C++. Definition: fastadv/ops/random_start.py.
//
// This op has a CUDA C++ and a Triton version. A Philox block is four values in logical order; here
// a thread holds the three interleaved blocks of a channels-last image at once and still reads and
// writes 16 bytes at a time, where Triton, whose tiles are powers of two, falls back to single
// elements and pads three channels to four.
//
// In l2 and l1 a first kernel computes the exact integer sum of squares or magnitudes of each
// sample's direction and the largest number of its radius stream. The second kernel draws the
// numbers again, which is cheaper than keeping them in memory.
#include "cuda/noise.cuh"

namespace fastadv::cuda {
namespace {

constexpr uint32_t kRadiusStream = 1;

// Of each part of a sample, [B, parts].
struct Measured {
  int64_t* sum;  // of squares or magnitudes
  int64_t* largest;
  Parts parts;
};

template <Ball kBall>
__device__ int32_t term(uint32_t word) {
  if constexpr (kBall == Ball::kL1) return abs(near_laplace(word));
  const int32_t g = near_gaussian(word);
  return g * g;
}

template <Ball kBall>
__global__ void __launch_bounds__(kMostThreads) measure(Noise n, Measured to) {
  const int64_t row = blockIdx.x / to.parts.count;
  const int64_t begin = (blockIdx.x - row * to.parts.count) * to.parts.length;
  const int64_t end = min(begin + to.parts.length, n.size);
  const uint64_t sample = uint64_t(n.ids ? n.ids[row] : row);
  const Key direction{n.seed, sample, 0}, radius{n.seed, sample, kRadiusStream};
  long long sum[1] = {0};
  unsigned largest[1] = {0};
  for (int64_t i = begin + threadIdx.x * 4; i < end; i += blockDim.x * 4) {
    const Words d = philox(direction, i / 4), r = philox(radius, i / 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k >= end) break;
      sum[0] += term<kBall>(d.at[k]);
      largest[0] = max(largest[0], r.at[k] >> 8);
    }
  }
  combine_block(sum, Add{});
  combine_block(largest, Larger{});
  if (threadIdx.x == 0) {
    to.sum[blockIdx.x] = sum[0];
    to.largest[blockIdx.x] = largest[0];
  }
}

// Length of the noise over length of the direction.
template <Ball kBall>
__device__ double ball_scale(const Measured& from, int64_t row, double eps) {
  int64_t sum = 0, largest = 0;
  for (int64_t part = 0; part < from.parts.count; ++part) {
    sum += from.sum[row * from.parts.count + part];
    largest = max(largest, from.largest[row * from.parts.count + part]);
  }
  const double share = double(largest + 1) * 0x1p-24;
  const double length = kBall == Ball::kL2 ? sqrt(double(sum)) : double(sum);
  return sum ? share * eps / length : 0.0;
}

template <class T, int kPlanes, Ball kBall>
__global__ void __launch_bounds__(kNoiseThreads)
    start(Noise n, unsigned blocks_per_sample, Measured measured) {
  using C = Compute<T>;
  const Place place(n, blocks_per_sample);
  const double eps = number_of(n.eps, place.row);
  C scale = C(eps);
  if constexpr (kBall != Ball::kLinf) scale = C(ball_scale<kBall>(measured, place.row, eps));
  const AddNoise<C, kBall> noise{scale, C(n.low), C(n.high)};
  Share<T, kPlanes>::apply(static_cast<T*>(n.out) + place.row * n.size,
                           static_cast<const T*>(n.x) + place.row * n.size, place.index, n,
                           place.key, noise);
}

template <Ball kBall>
cudaError_t launch(const Noise& n, int64_t* workspace, cudaStream_t stream) {
  const Parts parts = parts_of(n.size);
  const int64_t blocks = n.batch * parts.count;
  const Measured measured{workspace, workspace + blocks, parts};
  if constexpr (kBall != Ball::kLinf) {
    const int threads = reduction_threads(parts.length, 4);
    measure<kBall><<<unsigned(blocks), threads, 0, stream>>>(n, measured);
  }
  return dispatch_share(n, nullptr, [&](auto t, auto planes) {
    using T = typename decltype(t)::type;
    const int64_t per_sample = Share<T, planes.value>::blocks_per_sample(n);
    start<T, planes.value, kBall><<<unsigned(n.batch * per_sample), kNoiseThreads, 0, stream>>>(
        n, unsigned(per_sample), measured);
    return cudaGetLastError();
  });
}

}  // namespace

int64_t random_start_workspace(const Noise& n, Ball ball) {
  return ball == Ball::kLinf ? 0 : 2 * n.batch * parts_of(n.size).count;
}

cudaError_t launch_random_start(const Noise& n, Ball ball, int64_t* workspace,
                                cudaStream_t stream) {
  if (n.batch * n.size == 0) return cudaSuccess;
  if (ball == Ball::kLinf) return launch<Ball::kLinf>(n, workspace, stream);
  if (ball == Ball::kL2) return launch<Ball::kL2>(n, workspace, stream);
  return launch<Ball::kL1>(n, workspace, stream);
}

}  // namespace fastadv::cuda
