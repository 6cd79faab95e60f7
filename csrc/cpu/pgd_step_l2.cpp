// The PGD step in l2 on the CPU. Formula: fastadv/ops/pgd_step.py.
//
// The length after the step follows from three sums per sample, g.g, g.d and d.d with d = adv - x,
// because |d + f g|^2 = d.d + 2 f g.d + f^2 g.g; they are added up in double, as on every backend.
#include <cmath>

#include "cpu/pgd_step.h"
#include "cpu/sum.h"

namespace fastadv {
namespace {

// The gradient element as a double; one that is double itself over its scale, the largest
// magnitude, as squares of doubles can vanish or overflow.
template <class G>
FASTADV_INLINE double scaled(G grad, double scale) {
  if constexpr (std::is_same_v<G, double>) return grad / scale;
  return load(grad);
}

FASTADV_INLINE double scale_of(const double* grad, int64_t n) {
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double magnitude = std::abs(grad[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest > 0 ? largest : 1;
}

template <class G>
FASTADV_INLINE double scale_of(const G*, int64_t) {
  return 1;
}

template <class T, class G>
FASTADV_INLINE std::array<double, 3> products(const T* adv, const G* grad, const T* x, double scale,
                                              int64_t n) {
  return double_sums<3>(n, [&](int64_t i) __attribute__((always_inline)) {
    const double g = scaled(grad[i], scale);
    const double d = double(load(adv[i])) - double(load(x[i]));
    return std::array<double, 3>{g * g, g * d, d * d};
  });
}

// The factor of the (scaled) gradient, and the one that brings the moved point into the ball.
template <class C>
struct Projection {
  double factor;
  C shrink;
};

template <class C>
Projection<C> projection_of(const std::array<double, 3>& sums, const Limits<C>& limits) {
  const auto [gg, gd, dd] = sums;
  const bool usable = gg > 0 && std::isfinite(gg);
  double factor = usable ? double(limits.alpha) / std::sqrt(gg) : 0;
  if constexpr (std::is_same_v<C, float>) factor = rounded_to_float_precision(factor);
  const double squared = usable ? dd + 2 * factor * gd + factor * factor * gg : dd;
  const double length = std::sqrt(squared < 0 ? 0 : squared), radius = limits.eps;
  return {factor, C(length > radius ? radius / length : 1)};
}

template <class T, class G>
FASTADV_INLINE void write(T* out, const T* adv, const G* grad, const T* x, double scale,
                          Projection<Compute<T>> p, Limits<Compute<T>> limits, int64_t n) {
  using C = Compute<T>;
  for (int64_t i = 0; i < n; ++i) {
    const C step = p.factor == 0 ? C(0) : C(scaled(grad[i], scale) * p.factor);
    const C centre = load(x[i]), delta = load(adv[i]) + step - centre;
    store(out[i], clip(centre + delta * p.shrink, limits.low, limits.high));
  }
}

}  // namespace

void pgd_step_l2(const PgdImages& images, const PgdStep& step) {
  const int64_t size = sample_size(images.adv);
  dispatch_step(images, [&](auto t, auto g) {
    using T = decltype(t);
    using G = decltype(g);
    for_samples<T, G>(images, step,
                      [size](T* out, const T* adv, const G* grad, const T* x, auto limits) {
                        const double scale = FASTADV_DISPATCH(scale_of(grad, size));
                        const auto sums = FASTADV_DISPATCH(products(adv, grad, x, scale, size));
                        const auto p = projection_of(sums, limits);
                        FASTADV_DISPATCH(write(out, adv, grad, x, scale, p, limits, size));
                      });
  });
}

}  // namespace fastadv
