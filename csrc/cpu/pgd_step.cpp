// One step of projected gradient ascent on the CPU. Formula and budget: fastadv/ops/pgd_step.py.
#include <atomic>
#include <cmath>

#include "cpu/sum.h"
#include "cpu/tensor.h"

namespace fastadv {
namespace {

struct Counts {
  int64_t zeros = 0;
  int64_t nans = 0;
};

template <class C>
struct Limits {
  C eps, alpha, low, high;
};

template <class C>
FASTADV_INLINE C project_linf(C moved, C centre, const Limits<C>& limits) {
  const C floor = centre - limits.eps, ceiling = centre + limits.eps;
  moved = moved < floor ? floor : moved;
  moved = moved > ceiling ? ceiling : moved;
  moved = moved < limits.low ? limits.low : moved;
  return moved > limits.high ? limits.high : moved;
}

template <class T, class G>
FASTADV_CLONES void step_linf(T* out, const T* adv, const G* grad, const T* x,
                              Limits<Compute<T>> limits, int64_t n) {
  using C = Compute<T>;
  for (int64_t i = 0; i < n; ++i) {
    const auto g = load(grad[i]);
    const C step = g > 0 ? limits.alpha : (g < 0 ? -limits.alpha : C(0));
    store(out[i], project_linf<C>(load(adv[i]) + step, load(x[i]), limits));
  }
}

template <class G>
FASTADV_CLONES Counts count_gradient(const G* grad, int64_t n) {
  int64_t zeros = 0, nans = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto g = load(grad[i]);
    zeros += g == 0;
    nans += g != g;
  }
  return {zeros, nans};
}

template <class G>
FASTADV_CLONES Compute<G> largest_magnitude(const G* grad, int64_t n) {
  using C = Compute<G>;
  C lanes[kLanes] = {};
  const auto include = [&](int64_t i, int l) {
    const C magnitude = std::abs(load(grad[i]));
    lanes[l] = magnitude > lanes[l] ? magnitude : lanes[l];
  };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) include(i + l, l);
  }
  for (int64_t i = whole; i < n; ++i) include(i, int(i - whole));
  C largest = 0;
  for (C lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// Squared length of grad / scale: scaling first keeps squares of tiny gradients from vanishing.
template <class G>
FASTADV_CLONES double squared_length(const G* grad, Compute<G> scale, int64_t n) {
  using C = Compute<G>;
  return sums<C, 1>(n, [&](int64_t i) {
    const C g = load(grad[i]) / scale;
    return std::array<C, 1>{g * g};
  })[0];
}

// Where the step leads, relative to the centre: adv + factor * (grad / scale) - x.
template <class T, class G>
FASTADV_INLINE Compute<T> stepped_delta(T adv, G grad, T x, Compute<G> scale, Compute<T> factor) {
  const Compute<T> step = factor == 0 ? 0 : factor * Compute<T>(load(grad) / scale);
  return load(adv) + step - load(x);
}

template <class T, class G>
FASTADV_CLONES double squared_delta(const T* adv, const G* grad, const T* x, Compute<G> scale,
                                    Compute<T> factor, int64_t n) {
  using C = Compute<T>;
  return sums<C, 1>(n, [&](int64_t i) {
    const C delta = stepped_delta<T, G>(adv[i], grad[i], x[i], scale, factor);
    return std::array<C, 1>{delta * delta};
  })[0];
}

template <class T, class G>
FASTADV_CLONES void write_l2(T* out, const T* adv, const G* grad, const T* x, Compute<G> scale,
                             Compute<T> factor, Compute<T> shrink, Limits<Compute<T>> limits,
                             int64_t n) {
  using C = Compute<T>;
  for (int64_t i = 0; i < n; ++i) {
    C moved = load(x[i]) + stepped_delta<T, G>(adv[i], grad[i], x[i], scale, factor) * shrink;
    moved = moved < limits.low ? limits.low : moved;
    store(out[i], moved > limits.high ? limits.high : moved);
  }
}

// One sample in l2; it fits a core's cache, so its four passes read memory once.
template <class T, class G>
void step_l2(T* out, const T* adv, const G* grad, const T* x, Limits<Compute<T>> limits,
             int64_t n) {
  using C = Compute<T>;
  const auto scale = largest_magnitude(grad, n);
  const double length = scale > 0 ? std::sqrt(squared_length(grad, scale, n)) : 0.0;
  const bool usable = std::isfinite(length) && length > 0;
  const C factor = usable ? C(limits.alpha / length) : C(0);
  const double delta = std::sqrt(squared_delta(adv, grad, x, scale, factor, n));
  const C shrink = delta > limits.eps ? C(limits.eps / delta) : C(1);
  write_l2(out, adv, grad, x, scale, factor, shrink, limits, n);
}

struct Step {
  PerSample eps, alpha;
  bool linf;
  double low, high;

  template <class C>
  Limits<C> limits(int64_t sample) const {
    return {C(eps[sample]), C(alpha[sample]), C(low), C(high)};
  }
};

template <class T, class G>
void run(const at::Tensor& out, const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x,
         const Step& step) {
  using C = Compute<T>;
  const int64_t batch = adv.size(0), size = sample_size(adv);
  T* o = data<T>(out);
  const T *a = data<T>(adv), *c = data<T>(x);
  const G* g = data<G>(grad);
  if (step.linf && !step.eps.varies() && !step.alpha.varies()) {
    const auto limits = step.limits<C>(0);
    at::parallel_for(0, batch * size, kGrain, [&](int64_t begin, int64_t end) {
      step_linf(o + begin, a + begin, g + begin, c + begin, limits, end - begin);
    });
  } else if (step.linf) {
    parallel_over_samples(batch, size, [&](int64_t sample, int64_t begin, int64_t end) {
      const int64_t at = sample * size + begin;
      step_linf(o + at, a + at, g + at, c + at, step.limits<C>(sample), end - begin);
    });
  } else if (size > 0) {
    at::parallel_for(0, batch, std::max<int64_t>(1, kGrain / size), [&](int64_t b, int64_t e) {
      for (int64_t sample = b; sample < e; ++sample) {
        const int64_t at = sample * size;
        step_l2(o + at, a + at, g + at, c + at, step.limits<C>(sample), size);
      }
    });
  }
}

void step_into(const at::Tensor& out, const at::Tensor& adv, const at::Tensor& grad,
               const at::Tensor& x, const Step& step) {
  dispatch_float(adv.scalar_type(), "adv", [&](auto t) {
    dispatch_float(grad.scalar_type(), "grad",
                   [&](auto g) { run<decltype(t), decltype(g)>(out, adv, grad, x, step); });
  });
}

void add_counts(const at::Tensor& grad, const at::Tensor& counts) {
  TORCH_CHECK_VALUE(
      counts.scalar_type() == at::kLong && counts.numel() == 2 && counts.is_contiguous(),
      "counts must be a contiguous int64 tensor of shape [2], got ", counts.sizes());
  std::atomic<int64_t> zeros{0}, nans{0};
  dispatch_float(grad.scalar_type(), "grad", [&](auto t) {
    using G = decltype(t);
    at::parallel_for(0, grad.numel(), kGrain, [&](int64_t begin, int64_t end) {
      const Counts found = count_gradient(data<G>(grad) + begin, end - begin);
      zeros += found.zeros;
      nans += found.nans;
    });
  });
  counts.data_ptr<int64_t>()[0] += zeros;
  counts.data_ptr<int64_t>()[1] += nans;
}

Step make_step(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x, double eps,
               double alpha, const OptionalTensor& eps_per_sample,
               const OptionalTensor& alpha_per_sample, c10::string_view norm, double low,
               double high) {
  TORCH_CHECK_VALUE(adv.dim() > 0, "adv must have a batch axis, got a tensor without axes");
  check_shape(grad, "grad", adv, "adv");
  check_shape(x, "x", adv, "adv");
  TORCH_CHECK_TYPE(x.scalar_type() == adv.scalar_type(), "x must have the dtype of adv, ",
                   adv.scalar_type(), ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(norm == "linf" || norm == "l2", "norm must be one of linf, l2, got ", norm);
  const int64_t batch = adv.size(0);
  return {PerSample(eps, eps_per_sample, batch, "eps_per_sample"),
          PerSample(alpha, alpha_per_sample, batch, "alpha_per_sample"), norm == "linf", low, high};
}

at::Tensor pgd_step(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x, double eps,
                    double alpha, const OptionalTensor& eps_per_sample,
                    const OptionalTensor& alpha_per_sample, c10::string_view norm, double low,
                    double high) {
  const Step step =
      make_step(adv, grad, x, eps, alpha, eps_per_sample, alpha_per_sample, norm, low, high);
  const at::Tensor from = batch_major(adv);
  at::Tensor out = at::empty_like(adv);
  const bool direct = same_layout(out, from);
  const at::Tensor to = direct ? out : at::empty_like(from);
  step_into(to, from, in_layout_of(grad, from), in_layout_of(x, from), step);
  return direct ? out : out.copy_(to);
}

void pgd_step_(at::Tensor adv, const at::Tensor& grad, const at::Tensor& x, double eps,
               double alpha, const OptionalTensor& eps_per_sample,
               const OptionalTensor& alpha_per_sample, c10::string_view norm, double low,
               double high, const OptionalTensor& counts) {
  const Step step =
      make_step(adv, grad, x, eps, alpha, eps_per_sample, alpha_per_sample, norm, low, high);
  const at::Tensor at_hand = batch_major(adv);
  const at::Tensor g = in_layout_of(grad, at_hand);
  if (counts) add_counts(g, *counts);
  step_into(at_hand, at_hand, g, in_layout_of(x, at_hand), step);
  if (!at_hand.is_same(adv)) adv.copy_(at_hand);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("pgd_step", &pgd_step);
  m.impl("pgd_step_", &pgd_step_);
}

}  // namespace fastadv
