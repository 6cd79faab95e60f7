// Host side of the momentum update on CUDA devices.
#include "cuda/momentum_update.h"

#include "cuda/tensor.h"

namespace fastadv::cuda {
namespace {

void momentum_update_(at::Tensor momentum, const at::Tensor& grad, double decay,
                      const OptionalTensor& active) {
  const c10::cuda::CUDAGuard guard(momentum.device());
  check_momentum(momentum, grad);
  const at::Tensor chosen = checked_active(active, momentum);
  const at::Tensor at_hand = batch_major(momentum);
  const at::Tensor g = apart_from(at_hand, in_layout_of(grad, at_hand));
  MomentumUpdate update{at_hand.data_ptr(),
                        g.const_data_ptr(),
                        dtype_of(momentum, "momentum"),
                        dtype_of(grad, "grad"),
                        momentum.size(0),
                        sample_size(momentum),
                        decay,
                        chosen.defined() ? chosen.const_data_ptr<bool>() : nullptr,
                        nullptr};
  at::Tensor space;
  if (const int64_t needed = momentum_update_workspace(update)) {
    space = workspace(needed, at::kDouble, momentum);
    update.workspace = space.data_ptr<double>();
  }
  C10_CUDA_CHECK(launch_momentum_update(update, current_stream()));
  if (!at_hand.is_same(momentum)) momentum.copy_(at_hand);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CUDA, m) { m.impl("momentum_update_", &momentum_update_); }

}  // namespace fastadv::cuda
