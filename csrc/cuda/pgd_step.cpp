// Host side of the PGD step on CUDA devices.
#include "cuda/pgd_step.h"

#include "cuda/tensor.h"
#include "pgd_step_arguments.h"

namespace fastadv::cuda {
namespace {

// The launchers' arguments but for the pointers to images, which step_into fills in.
PgdStep made_step(const at::Tensor& adv, const at::Tensor& grad, const PgdStepArguments& a) {
  PgdStep step{};
  step.dtype = dtype_of(adv, "adv");
  step.grad_dtype = dtype_of(grad, "grad");
  step.batch = adv.size(0);
  step.size = sample_size(adv);
  step.eps = per_sample(a.eps, a.eps_per_sample, "eps_per_sample", adv);
  step.alpha = per_sample(a.alpha, a.alpha_per_sample, "alpha_per_sample", adv);
  step.low = a.low;
  step.high = a.high;
  step.sparsity = a.sparsity;
  return step;
}

// `out` and `adv` are batch-major and of one layout.
void step_into(const at::Tensor& out, const at::Tensor& adv, const at::Tensor& grad,
               const at::Tensor& x, c10::string_view norm, const OptionalTensor& active,
               PgdStep step) {
  const at::Tensor chosen = checked_active(active, adv);
  const at::Tensor g = apart_from(out, in_layout_of(grad, adv));
  const at::Tensor centre = apart_from(out, in_layout_of(x, adv));
  step.out = out.data_ptr();
  step.adv = adv.const_data_ptr();
  step.grad = g.const_data_ptr();
  step.x = centre.const_data_ptr();
  step.active = chosen.defined() ? chosen.const_data_ptr<bool>() : nullptr;
  if (norm != "l2") {
    const auto launch = norm == "linf" ? launch_pgd_step_linf : launch_pgd_step_l1;
    C10_CUDA_CHECK(launch(step, current_stream()));
    return;
  }
  at::Tensor space;
  if (const int64_t needed = pgd_step_l2_workspace(step)) {
    space = workspace(needed, at::kDouble, adv);
    step.workspace = space.data_ptr<double>();
  }
  C10_CUDA_CHECK(launch_pgd_step_l2(step, current_stream()));
}

struct Cuda {
  static at::Tensor step(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x,
                         const PgdStepArguments& a) {
    const c10::cuda::CUDAGuard guard(adv.device());
    const at::Tensor from = batch_major(adv);
    at::Tensor out = at::empty_like(adv);
    const bool direct = same_layout(out, from);
    const at::Tensor to = direct ? out : at::empty_like(from);
    step_into(to, from, grad, x, a.norm, a.active, made_step(adv, grad, a));
    return direct ? out : out.copy_(to);
  }
  static void step_(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x,
                    const PgdStepArguments& a, const OptionalTensor& counts) {
    const c10::cuda::CUDAGuard guard(adv.device());
    PgdStep step = made_step(adv, grad, a);
    if (counts) step.counts = counts->data_ptr<int64_t>();
    const at::Tensor at_hand = batch_major(adv);
    step_into(at_hand, at_hand, grad, x, a.norm, a.active, step);
    if (!at_hand.is_same(adv)) adv.copy_(at_hand);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CUDA, m) {
  m.impl("pgd_step", &PgdStepOps<Cuda>::pgd_step);
  m.impl("pgd_step_", &PgdStepOps<Cuda>::pgd_step_);
}

}  // namespace fastadv::cuda
