// Host side of the noisy replay on CUDA devices.
#include "cuda/noise_tensor.h"

namespace fastadv::cuda {
namespace {

// torch compares in the dtype of the distances, so tau is rounded to it.
double rounded_to(double tau, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat:
      return float(tau);
    case Dtype::kBFloat16:
      return c10::BFloat16(float(tau));
    case Dtype::kHalf:
      return c10::Half(float(tau));
    default:
      return tau;
  }
}

at::Tensor noisy_replay(const at::Tensor& x, const at::Tensor& adv, const at::Tensor& distance,
                        double tau, double eps, const OptionalTensor& eps_per_sample, double low,
                        double high, int64_t seed, const OptionalTensor& sample_ids) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_replay(x, adv, distance);
  const NoiseTensors t(x, eps, eps_per_sample, low, high, seed, sample_ids);
  const at::Tensor attacked = in_layout_of(adv, t.from);
  const PerSample far = per_sample(distance, "distance", x);
  const Replay replay{t.noise, attacked.const_data_ptr(), far, rounded_to(tau, far.dtype)};
  C10_CUDA_CHECK(launch_noisy_replay(replay, current_stream()));
  return t.result();
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CUDA, m) { m.impl("noisy_replay", &noisy_replay); }

}  // namespace fastadv::cuda
