// What the norms of the PGD step share on the CPU. Formula and budget: fastadv/ops/pgd_step.py.
#pragma once

#include "cpu/active.h"
#include "cpu/tensor.h"

namespace fastadv {

template <class C>
struct Limits {
  C eps, alpha, low, high;
};

// The arguments of a step that are not images.
struct PgdStep {
  PerSample eps, alpha;
  double low, high;
  double sparsity;
  Active active;

  template <class C>
  Limits<C> limits(int64_t sample) const {
    return {C(eps[sample]), C(alpha[sample]), C(low), C(high)};
  }
};

template <class C>
FASTADV_INLINE C clip(C v, C low, C high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// The images of one step: batch-major and of one layout; `out` may be `adv`.
struct PgdImages {
  const at::Tensor &out, &adv, &grad, &x;
};

// Calls f(T{}, G{}) with the storage types of the images and of the gradient.
template <class F>
void dispatch_step(const PgdImages& images, const F& f) {
  dispatch_float(images.adv.scalar_type(), "adv", [&](auto t) {
    dispatch_float(images.grad.scalar_type(), "grad", [&](auto g) { f(t, g); });
  });
}

// What is done to one sample: step(out, adv, grad, x, limits), over the batch in parallel. One task
// takes whole samples, which fit a core's cache, so that several passes read memory once.
template <class T, class G, class F>
void for_samples(const PgdImages& images, const PgdStep& step, const F& f) {
  const int64_t batch = images.adv.size(0), size = sample_size(images.adv);
  if (size == 0) return;
  T* out = data<T>(images.out);
  const T *adv = data<T>(images.adv), *x = data<T>(images.x);
  const G* grad = data<G>(images.grad);
  at::parallel_for(0, batch, std::max<int64_t>(1, kGrain / size), [&](int64_t b, int64_t e) {
    for (int64_t sample = b; sample < e; ++sample) {
      const int64_t at = sample * size;
      if (step.active[sample]) {
        f(out + at, adv + at, grad + at, x + at, step.limits<Compute<T>>(sample));
      } else {
        copy_elements(out + at, adv + at, size);
      }
    }
  });
}

void pgd_step_l2(const PgdImages& images, const PgdStep& step);
void pgd_step_l1(const PgdImages& images, const PgdStep& step);

}  // namespace fastadv
