// The arguments of the ops pgd_step and pgd_step_ on every backend, and their checks. A further
// argument of the schema gets its place here, in the same order.
#pragma once

#include "checks.h"

namespace fastadv {

// Those after the images.
struct PgdStepArguments {
  double eps, alpha;
  const OptionalTensor &eps_per_sample, &alpha_per_sample;
  c10::string_view norm;
  double low, high, sparsity;
  const OptionalTensor& active;
};

inline void check_images(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x) {
  check_batched(adv, "adv");
  check_shape(grad, "grad", adv, "adv");
  check_shape(x, "x", adv, "adv");
  check_dtype(x, "x", adv, "adv");
}

inline void check_counts(const at::Tensor& counts, const at::Tensor& adv) {
  TORCH_CHECK_VALUE(
      counts.scalar_type() == at::kLong && counts.numel() == 2 && counts.is_contiguous(),
      "counts must be a contiguous int64 tensor of shape [2], got ", counts.sizes());
  check_device(counts, "counts", adv);
}

// The two ops, as functions from whose parameters torch reads the types of the schema. A Backend
// has `step(adv, grad, x, arguments)`, and `step_`, whose last parameter is `counts`.
template <class Backend, class... A>
struct PgdStepOpsOf {
  static void check(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x,
                    const PgdStepArguments& a) {
    check_images(adv, grad, x);
    check_norm(a.norm);
    TORCH_CHECK_VALUE(a.sparsity >= 0 && a.sparsity < 1, "sparsity must be in [0, 1), got ",
                      a.sparsity);
  }
  static at::Tensor pgd_step(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x,
                             A... a) {
    const PgdStepArguments arguments{a...};
    check(adv, grad, x, arguments);
    return Backend::step(adv, grad, x, arguments);
  }
  static void pgd_step_(at::Tensor adv, const at::Tensor& grad, const at::Tensor& x, A... a,
                        const OptionalTensor& counts) {
    const PgdStepArguments arguments{a...};
    check(adv, grad, x, arguments);
    if (counts) check_counts(*counts, adv);
    Backend::step_(adv, grad, x, arguments, counts);
  }
};

template <class Backend>
using PgdStepOps =
    PgdStepOpsOf<Backend, double, double, const OptionalTensor&, const OptionalTensor&,
                 c10::string_view, double, double, double, const OptionalTensor&>;

}  // namespace fastadv
