// Host side of the PGD step on CUDA devices.
#include "cuda/pgd_step.h"

#include "cuda/tensor.h"

namespace fastadv::cuda {
namespace {

// The arguments that are not images; the pointers to images are filled in by step_into.
PgdStep make_step(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x, double eps,
                  double alpha, const OptionalTensor& eps_per_sample,
                  const OptionalTensor& alpha_per_sample, c10::string_view norm, double low,
                  double high, double sparsity) {
  check_batched(adv, "adv");
  check_shape(grad, "grad", adv, "adv");
  check_shape(x, "x", adv, "adv");
  TORCH_CHECK_TYPE(x.scalar_type() == adv.scalar_type(), "x must have the dtype of adv, ",
                   adv.scalar_type(), ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(norm == "linf" || norm == "l2" || norm == "l1",
                    "norm must be one of linf, l2, l1, got ", norm);
  TORCH_CHECK_VALUE(sparsity >= 0 && sparsity < 1, "sparsity must be in [0, 1), got ", sparsity);
  PgdStep step{};
  step.dtype = dtype_of(adv, "adv");
  step.grad_dtype = dtype_of(grad, "grad");
  step.batch = adv.size(0);
  step.size = sample_size(adv);
  step.eps = per_sample(eps, eps_per_sample, "eps_per_sample", adv);
  step.alpha = per_sample(alpha, alpha_per_sample, "alpha_per_sample", adv);
  step.low = low;
  step.high = high;
  step.sparsity = sparsity;
  return step;
}

// `out` and `adv` are batch-major and of one layout.
void step_into(const at::Tensor& out, const at::Tensor& adv, const at::Tensor& grad,
               const at::Tensor& x, c10::string_view norm, const OptionalTensor& active,
               PgdStep step) {
  const at::Tensor chosen = checked_active(active, adv);
  const at::Tensor g = in_layout_of(grad, adv), centre = in_layout_of(x, adv);
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

at::Tensor pgd_step(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x, double eps,
                    double alpha, const OptionalTensor& eps_per_sample,
                    const OptionalTensor& alpha_per_sample, c10::string_view norm, double low,
                    double high, double sparsity, const OptionalTensor& active) {
  const c10::cuda::CUDAGuard guard(adv.device());
  const PgdStep step = make_step(adv, grad, x, eps, alpha, eps_per_sample, alpha_per_sample, norm,
                                 low, high, sparsity);
  const at::Tensor from = batch_major(adv);
  at::Tensor out = at::empty_like(adv);
  const bool direct = same_layout(out, from);
  const at::Tensor to = direct ? out : at::empty_like(from);
  step_into(to, from, grad, x, norm, active, step);
  return direct ? out : out.copy_(to);
}

void pgd_step_(at::Tensor adv, const at::Tensor& grad, const at::Tensor& x, double eps,
               double alpha, const OptionalTensor& eps_per_sample,
               const OptionalTensor& alpha_per_sample, c10::string_view norm, double low,
               double high, double sparsity, const OptionalTensor& active,
               const OptionalTensor& counts) {
  const c10::cuda::CUDAGuard guard(adv.device());
  PgdStep step = make_step(adv, grad, x, eps, alpha, eps_per_sample, alpha_per_sample, norm, low,
                           high, sparsity);
  if (counts) {
    TORCH_CHECK_VALUE(
        counts->scalar_type() == at::kLong && counts->numel() == 2 && counts->is_contiguous(),
        "counts must be a contiguous int64 tensor of shape [2], got ", counts->sizes());
    check_device(*counts, "counts", adv);
    step.counts = counts->data_ptr<int64_t>();
  }
  const at::Tensor at_hand = batch_major(adv);
  step_into(at_hand, at_hand, grad, x, norm, active, step);
  if (!at_hand.is_same(adv)) adv.copy_(at_hand);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CUDA, m) {
  m.impl("pgd_step", &pgd_step);
  m.impl("pgd_step_", &pgd_step_);
}

}  // namespace fastadv::cuda
