// One step of projected gradient ascent on the CPU. Formula and budget: fastadv/ops/pgd_step.py.
#include "cpu/pgd_step.h"

#include <atomic>

namespace fastadv {
namespace {

struct Counts {
  int64_t zeros = 0;
  int64_t nans = 0;
};

template <class T, class G>
FASTADV_INLINE void step_linf(T* out, const T* adv, const G* grad, const T* x,
                              Limits<Compute<T>> limits, int64_t n) {
  using C = Compute<T>;
  for (int64_t i = 0; i < n; ++i) {
    const auto g = load(grad[i]);
    const C centre = load(x[i]);
    const C step = g > 0 ? limits.alpha : (g < 0 ? -limits.alpha : C(0));
    const C moved = clip(load(adv[i]) + step, centre - limits.eps, centre + limits.eps);
    store(out[i], clip(moved, limits.low, limits.high));
  }
}

template <class G>
FASTADV_INLINE Counts count_gradient(const G* grad, int64_t n) {
  int64_t zeros = 0, nans = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto g = load(grad[i]);
    zeros += g == 0;
    nans += g != g;
  }
  return {zeros, nans};
}

template <class T, class G>
void run_linf(const PgdImages& images, const PgdStep& step) {
  using C = Compute<T>;
  const int64_t batch = images.adv.size(0), size = sample_size(images.adv);
  T* out = data<T>(images.out);
  const T *adv = data<T>(images.adv), *x = data<T>(images.x);
  const G* grad = data<G>(images.grad);
  if (step.eps.varies() || step.alpha.varies() || !step.active.all()) {
    parallel_over_samples(batch, size, [&](int64_t sample, int64_t begin, int64_t end) {
      const int64_t at = sample * size + begin;
      if (step.active[sample]) {
        const auto limits = step.limits<C>(sample);
        FASTADV_DISPATCH(step_linf(out + at, adv + at, grad + at, x + at, limits, end - begin));
      } else {
        copy_elements(out + at, adv + at, end - begin);
      }
    });
    return;
  }
  const auto limits = step.limits<C>(0);
  at::parallel_for(0, batch * size, kGrain, [&](int64_t begin, int64_t end) {
    FASTADV_DISPATCH(
        step_linf(out + begin, adv + begin, grad + begin, x + begin, limits, end - begin));
  });
}

void step_into(const PgdImages& images, const PgdStep& step, c10::string_view norm) {
  if (norm == "l2") return pgd_step_l2(images, step);
  if (norm == "l1") return pgd_step_l1(images, step);
  dispatch_step(images, [&](auto t, auto g) { run_linf<decltype(t), decltype(g)>(images, step); });
}

void add_counts(const at::Tensor& grad, const Active& active, const at::Tensor& counts) {
  TORCH_CHECK_VALUE(
      counts.scalar_type() == at::kLong && counts.numel() == 2 && counts.is_contiguous(),
      "counts must be a contiguous int64 tensor of shape [2], got ", counts.sizes());
  const int64_t size = sample_size(grad);
  std::atomic<int64_t> zeros{0}, nans{0};
  dispatch_float(grad.scalar_type(), "grad", [&](auto t) {
    using G = decltype(t);
    parallel_over_samples(grad.size(0), size, [&](int64_t sample, int64_t begin, int64_t end) {
      if (!active[sample]) return;
      const G* g = data<G>(grad) + sample * size + begin;
      const Counts found = FASTADV_DISPATCH(count_gradient(g, end - begin));
      zeros += found.zeros;
      nans += found.nans;
    });
  });
  counts.data_ptr<int64_t>()[0] += zeros;
  counts.data_ptr<int64_t>()[1] += nans;
}

PgdStep make_step(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x, double eps,
                  double alpha, const OptionalTensor& eps_per_sample,
                  const OptionalTensor& alpha_per_sample, c10::string_view norm, double low,
                  double high, double sparsity, const OptionalTensor& active) {
  TORCH_CHECK_VALUE(adv.dim() > 0, "adv must have a batch axis, got a tensor without axes");
  check_shape(grad, "grad", adv, "adv");
  check_shape(x, "x", adv, "adv");
  TORCH_CHECK_TYPE(x.scalar_type() == adv.scalar_type(), "x must have the dtype of adv, ",
                   adv.scalar_type(), ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(norm == "linf" || norm == "l2" || norm == "l1",
                    "norm must be one of linf, l2, l1, got ", norm);
  TORCH_CHECK_VALUE(sparsity >= 0 && sparsity < 1, "sparsity must be in [0, 1), got ", sparsity);
  const int64_t batch = adv.size(0);
  return {PerSample(eps, eps_per_sample, batch, "eps_per_sample"),
          PerSample(alpha, alpha_per_sample, batch, "alpha_per_sample"),
          low,
          high,
          sparsity,
          Active(active, batch)};
}

at::Tensor pgd_step(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x, double eps,
                    double alpha, const OptionalTensor& eps_per_sample,
                    const OptionalTensor& alpha_per_sample, c10::string_view norm, double low,
                    double high, double sparsity, const OptionalTensor& active) {
  const PgdStep step = make_step(adv, grad, x, eps, alpha, eps_per_sample, alpha_per_sample, norm,
                                 low, high, sparsity, active);
  const at::Tensor from = batch_major(adv);
  at::Tensor out = at::empty_like(adv);
  const bool direct = same_layout(out, from);
  const at::Tensor to = direct ? out : at::empty_like(from);
  step_into({to, from, in_layout_of(grad, from), in_layout_of(x, from)}, step, norm);
  return direct ? out : out.copy_(to);
}

void pgd_step_(at::Tensor adv, const at::Tensor& grad, const at::Tensor& x, double eps,
               double alpha, const OptionalTensor& eps_per_sample,
               const OptionalTensor& alpha_per_sample, c10::string_view norm, double low,
               double high, double sparsity, const OptionalTensor& active,
               const OptionalTensor& counts) {
  const PgdStep step = make_step(adv, grad, x, eps, alpha, eps_per_sample, alpha_per_sample, norm,
                                 low, high, sparsity, active);
  const at::Tensor at_hand = batch_major(adv);
  const at::Tensor g = in_layout_of(grad, at_hand);
  if (counts) add_counts(g, step.active, *counts);
  step_into({at_hand, at_hand, g, in_layout_of(x, at_hand)}, step, norm);
  if (!at_hand.is_same(adv)) adv.copy_(at_hand);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("pgd_step", &pgd_step);
  m.impl("pgd_step_", &pgd_step_);
}

}  // namespace fastadv
