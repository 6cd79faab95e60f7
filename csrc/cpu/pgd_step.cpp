// One step of projected gradient ascent on the CPU. Formula and budget: fastadv/ops/pgd_step.py.
#include "cpu/pgd_step.h"

#include <atomic>

namespace fastadv {
namespace {

struct Counts {
  int64_t zeros = 0;
  int64_t not_finite = 0;
};

template <class G>
FASTADV_INLINE Counts count_gradient(const G* grad, int64_t n) {
  int64_t zeros = 0, not_finite = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto g = load(grad[i]);
    zeros += g == 0;
    not_finite += g - g != 0;  // NaN for infinities and NaN
  }
  return {zeros, not_finite};
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

PgdStep made_step(const at::Tensor& adv, const PgdStepArguments& a) {
  return {PerSample(a.eps, a.eps_per_sample, adv, "eps_per_sample"),
          PerSample(a.alpha, a.alpha_per_sample, adv, "alpha_per_sample"),
          a.low,
          a.high,
          a.sparsity,
          Active(a.active, adv)};
}

struct Cpu {
  static at::Tensor step(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x,
                         const PgdStepArguments& a) {
    const PgdStep step = made_step(adv, a);
    return stepped(adv, grad, x, [&](const PgdImages& images) { step_into(images, step, a.norm); });
  }
  static void step_(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x,
                    const PgdStepArguments& a, const OptionalTensor& counts) {
    const PgdStep step = made_step(adv, a);
    step_in_place(adv, grad, x, step.active, counts,
                  [&](const PgdImages& images) { step_into(images, step, a.norm); });
  }
};

}  // namespace

void add_counts(const at::Tensor& grad, const Active& active, const at::Tensor& counts) {
  const int64_t size = sample_size(grad);
  std::atomic<int64_t> zeros{0}, not_finite{0};
  dispatch_float(grad.scalar_type(), "grad", [&](auto t) {
    using G = decltype(t);
    parallel_over_samples(grad.size(0), size, [&](int64_t sample, int64_t begin, int64_t end) {
      if (!active[sample]) return;
      const G* g = data<G>(grad) + sample * size + begin;
      const Counts found = FASTADV_DISPATCH(count_gradient(g, end - begin));
      zeros += found.zeros;
      not_finite += found.not_finite;
    });
  });
  counts.data_ptr<int64_t>()[0] += zeros;
  counts.data_ptr<int64_t>()[1] += not_finite;
}

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("pgd_step", &PgdStepOps<Cpu>::pgd_step);
  m.impl("pgd_step_", &PgdStepOps<Cpu>::pgd_step_);
}

}  // namespace fastadv
