// Host side of the random start on CUDA devices.
#include "cuda/noise_tensor.h"

namespace fastadv::cuda {
namespace {

at::Tensor random_start(const at::Tensor& x, double eps, const OptionalTensor& eps_per_sample,
                        c10::string_view norm, double low, double high, int64_t seed,
                        const OptionalTensor& sample_ids) {
  const c10::cuda::CUDAGuard guard(x.device());
  check_norm(norm);
  const Ball ball = norm == "linf" ? Ball::kLinf : norm == "l2" ? Ball::kL2 : Ball::kL1;
  const NoiseTensors t(x, eps, eps_per_sample, low, high, seed, sample_ids);
  const at::Tensor space = workspace(random_start_workspace(t.noise, ball), at::kLong, x);
  C10_CUDA_CHECK(launch_random_start(t.noise, ball, space.data_ptr<int64_t>(), current_stream()));
  return t.result();
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CUDA, m) { m.impl("random_start", &random_start); }

}  // namespace fastadv::cuda
