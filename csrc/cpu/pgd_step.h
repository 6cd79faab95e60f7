// Arguments, dispatch and counters of the PGD step on the CPU, the same for all norms. Formula and
// budget: fastadv/ops/pgd_step.py.
#pragma once

#include "cpu/active.h"
#include "cpu/tensor.h"
#include "pgd_step_arguments.h"

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

// One element of the linf step.
template <class C, class V>
FASTADV_INLINE C linf_moved(C adv, V grad, C x, const Limits<C>& limits) {
  const C step = grad > 0 ? limits.alpha : (grad < 0 ? -limits.alpha : C(0));
  return clip(clip(adv + step, x - limits.eps, x + limits.eps), limits.low, limits.high);
}

template <class T, class G>
FASTADV_INLINE void step_linf(T* out, const T* adv, const G* grad, const T* x,
                              Limits<Compute<T>> limits, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    store(out[i], linf_moved(load(adv[i]), load(grad[i]), load(x[i]), limits));
  }
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

// Adds the zero elements, and those that are not finite, of a batch-major gradient to two counters.
void add_counts(const at::Tensor& grad, const Active& active, const at::Tensor& counts);

// The step as an op that returns its result, and as one that writes into `adv`: `into` does it on
// the batch-major images of one layout.
template <class F>
at::Tensor stepped(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x,
                   const F& into) {
  const at::Tensor from = batch_major(adv);
  at::Tensor out = at::empty_like(adv);
  const bool direct = same_layout(out, from);
  const at::Tensor to = direct ? out : at::empty_like(from);
  into(PgdImages{to, from, in_layout_of(grad, from), in_layout_of(x, from)});
  return direct ? out : out.copy_(to);
}

template <class F>
void step_in_place(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x,
                   const Active& active, const OptionalTensor& counts, const F& into) {
  const at::Tensor at_hand = batch_major(adv);
  const at::Tensor g = apart_from(at_hand, in_layout_of(grad, at_hand));
  if (counts) add_counts(g, active, *counts);
  into(PgdImages{at_hand, at_hand, g, apart_from(at_hand, in_layout_of(x, at_hand))});
  if (!at_hand.is_same(adv)) adv.copy_(at_hand);
}

void pgd_step_l2(const PgdImages& images, const PgdStep& step);
void pgd_step_l1(const PgdImages& images, const PgdStep& step);

}  // namespace fastadv
