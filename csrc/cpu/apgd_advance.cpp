// A step of Auto-PGD in linf on a batch in which each row has its own step number. Schema and
// meaning: fastadv/attacks/apgd_advance.py.
#include "cpu/pgd_step.h"

namespace fastadv {
namespace {

// One row's images; `point` and `direction` may be `best` and `best_grad`.
template <class T, class G>
struct Row {
  T *adv, *before;
  const T *point, *x;
  const G* direction;
};

template <class T, class G>
FASTADV_INLINE void first_step(const Row<T, G>& row, Limits<T> limits, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T point = row.point[i];
    row.adv[i] = linf_moved(point, load(row.direction[i]), row.x[i], limits);
    row.before[i] = point;
  }
}

// The operations come in the order of torch's own, and are not contracted, so that the results have
// the same bits.
template <class T, class G>
FASTADV_INLINE void later_step(const Row<T, G>& row, Limits<T> limits, T momentum, int64_t n) {
  const T rest = T(1) - momentum;
  for (int64_t i = 0; i < n; ++i) {
    const T point = row.point[i], x = row.x[i];
    const T stepped = linf_moved(point, load(row.direction[i]), x, limits);
    const T moved = (point + (stepped - point) * momentum) + (point - row.before[i]) * rest;
    row.adv[i] = clip(clip(moved, x - limits.eps, x + limits.eps), limits.low, limits.high);
    row.before[i] = point;
  }
}

const bool* flags_of(const at::Tensor& flags, const char* name, const at::Tensor& adv) {
  TORCH_CHECK_TYPE(flags.scalar_type() == at::kBool, name, " must be a bool tensor, got ",
                   flags.scalar_type());
  check_per_sample(flags, name, adv);
  TORCH_CHECK_VALUE(flags.is_contiguous(), name, " must be contiguous");
  return flags.const_data_ptr<bool>();
}

void check_images(const at::Tensor& t, const char* name, const at::Tensor& adv) {
  check_shape(t, name, adv, "adv");
  TORCH_CHECK_VALUE(same_layout(t, adv), name, " must have the layout of adv, with strides ",
                    adv.strides(), ", got ", t.strides());
}

void apgd_advance_(at::Tensor adv, at::Tensor before, at::Tensor best, at::Tensor best_grad,
                   at::Tensor kept, const at::Tensor& grad, const at::Tensor& x,
                   const at::Tensor& alpha, const at::Tensor& fresh, const at::Tensor& better,
                   const at::Tensor& keep, const at::Tensor& back, double eps, double low,
                   double high, double momentum) {
  check_batched(adv, "adv");
  TORCH_CHECK_VALUE(is_batch_major(adv), "adv must be a dense run of samples in memory");
  check_images(before, "before", adv);
  check_images(best, "best", adv);
  check_images(best_grad, "best_grad", adv);
  check_images(kept, "kept", adv);
  check_images(grad, "grad", adv);
  check_images(x, "x", adv);
  for (const at::Tensor& t : {before, best, kept, x}) check_dtype(t, "images", adv, "adv");
  check_dtype(best_grad, "best_grad", grad, "grad");
  const PerSample step(0, alpha, adv, "alpha");
  const bool *is_fresh = flags_of(fresh, "fresh", adv),
             *is_better = flags_of(better, "better", adv), *is_kept = flags_of(keep, "keep", adv),
             *goes_back = flags_of(back, "back", adv);
  const int64_t size = sample_size(adv);
  if (size == 0) return;
  const auto run = [&](auto t, auto g) {
    using T = decltype(t);
    using G = decltype(g);
    T *to = data<T>(adv), *last = data<T>(before), *top = data<T>(best), *worst = data<T>(kept);
    const T* clean = data<T>(x);
    G* top_grad = data<G>(best_grad);
    const G* here = data<G>(grad);
    const int64_t grain = std::max<int64_t>(1, kGrain / size);
    at::parallel_for(0, adv.size(0), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * size;
        if (is_kept[i]) copy_elements(worst + at, to + at, size);
        if (is_better[i]) {
          copy_elements(top + at, to + at, size);
          copy_elements(top_grad + at, here + at, size);
        }
        const bool from_best = goes_back[i];
        const Row<T, G> row{to + at, last + at, (from_best ? top : to) + at, clean + at,
                            (from_best ? top_grad : here) + at};
        const Limits<T> limits{T(eps), T(step[i]), T(low), T(high)};
        if (is_fresh[i]) {
          FASTADV_DISPATCH(first_step(row, limits, size));
        } else {
          FASTADV_DISPATCH(later_step(row, limits, T(momentum), size));
        }
      }
    });
  };
  TORCH_CHECK_TYPE(adv.scalar_type() == at::kFloat || adv.scalar_type() == at::kDouble,
                   "adv must be float32 or float64, got ", adv.scalar_type());
  dispatch_float(grad.scalar_type(), "grad", [&](auto g) {
    if (adv.scalar_type() == at::kFloat) {
      run(float{}, g);
    } else {
      run(double{}, g);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("apgd_advance_", &apgd_advance_); }

}  // namespace fastadv
