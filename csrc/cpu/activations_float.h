// The activations of csrc/cpu/rows.h and the products of gradients with their slopes, on vectors of
// floats (csrc/cpu/vectors.h).
//
// Values are within 4 units in the last place of the exact number. Slopes are within 4 units of the
// sum of their terms' magnitudes. In the lower tails of the two forms of GELU the rounding of the
// exponent adds x^2 / 4 units, and 1.5 units for each unit of tanh's form. A power of e below the
// smallest normal number is 0. Infinite numbers and NaN give the results of torch.
#pragma once

#include "cpu/rows.h"
#include "cpu/vectors.h"

namespace fastadv::rows {
namespace {

template <class V>
using BitsOf = Vector<uint32_t, sizeof(V)>;

template <class V>
FASTADV_INLINE V minus_absolute(V x) {
  return (V)((BitsOf<V>)x | 0x80000000u);
}

// s = 1 / (1 + e^-x) and c = 1 - s, which would lose its digits as a difference.
template <class V>
struct Sigmoid {
  V s, c;
  FASTADV_INLINE explicit Sigmoid(V x) {
    const V e = exp_of_negative(minus_absolute(x));
    const V more = 1.f / (e + 1.f), less = e * more;
    s = x < 0.f ? less : more;
    c = x < 0.f ? more : less;
  }
};

// Phi(x) of the normal distribution and its derivative.
template <class V>
struct Normal {
  V below, density;
  FASTADV_INLINE explicit Normal(V x) {
    const V t = -minus_absolute(x);
    const V e = exp_of_negative(t * t * -.5f);
    // e^(t^2 / 2) Phi(-t) = P(u) / (t + 4) with u = (t - 4) / (t + 4), fitted to a relative error
    // of 1e-8.
    constexpr float kTail[] = {.755285135f,    -.607896565f,   .387136956f,    -.186524028f,
                               .060402758f,    -.00752195262f, -.00350583661f, .00156634098f,
                               1.66724479e-4f, -1.38078216e-4f};
    const V share = 1.f / (t + 4.f), u = share * -8.f + 1.f;
    V sum = V{} + kTail[9];
    for (int i = 8; i >= 0; --i) sum = sum * u + kTail[i];
    const V tail = e * (sum * share);
    below = x < 0.f ? tail : 1.f - tail;
    density = e * .398942280f;
  }
};

constexpr float kTanhScale = 2 * .7978845608f;  // 2 sqrt(2 / pi)
constexpr float kTanhCube = .044715f;

// clamp(x + 3, 0, 6) / 6; NaN stays.
template <class V>
FASTADV_INLINE V hard(V x) {
  const V up = x + 3.f, low = up < 0.f ? V{} : up;
  return (low > 6.f ? V{} + 6.f : low) * (1.f / 6);
}

template <Activation kind, class V>
FASTADV_INLINE V value_of(V x) {
  if constexpr (kind == Activation::kGelu) {
    return x * Normal<V>(x).below;
  } else if constexpr (kind == Activation::kGeluTanh) {
    return x * Sigmoid<V>(x * kTanhScale * (x * x * kTanhCube + 1.f)).s;
  } else if constexpr (kind == Activation::kSilu) {
    return x * Sigmoid<V>(x).s;
  } else if constexpr (kind == Activation::kHardswish) {
    return x * hard(x);
  } else if constexpr (kind == Activation::kHardsigmoid) {
    return hard(x);
  } else if constexpr (kind == Activation::kSigmoid) {
    return Sigmoid<V>(x).s;
  } else {
    const V low = x < 0.f ? V{} : x;
    return low > 6.f ? V{} + 6.f : low;
  }
}

// g times the slope. Where a slope of pieces is 0, the result is 0, whatever g is.
template <Activation kind, class V>
FASTADV_INLINE V gradient_of(V g, V x) {
  if constexpr (kind == Activation::kGelu) {
    const Normal<V> normal(x);
    return g * (x * normal.density + normal.below);
  } else if constexpr (kind == Activation::kGeluTanh) {
    const V square = x * x;
    const Sigmoid<V> at(x * kTanhScale * (square * kTanhCube + 1.f));
    // Far out s c is 0, and the square may be infinite.
    const V bounded = square > 1e4f ? V{} + 1e4f : square;
    const V steep = (bounded * (3 * kTanhCube) + 1.f) * kTanhScale;
    return g * (x * (at.s * at.c) * steep + at.s);
  } else if constexpr (kind == Activation::kSilu) {
    const Sigmoid<V> at(x);
    return g * (at.s * (x * at.c + 1.f));
  } else if constexpr (kind == Activation::kHardswish) {
    const V up = x < 3.f ? g * (x * (1.f / 3) + .5f) : g;
    return x <= -3.f ? V{} : up;
  } else if constexpr (kind == Activation::kHardsigmoid) {
    const V low = x > -3.f ? g * (1.f / 6) : V{};
    return x < 3.f ? low : V{};
  } else if constexpr (kind == Activation::kSigmoid) {
    const Sigmoid<V> at(x);
    return g * (at.s * at.c);
  } else {
    const V low = x <= 0.f ? V{} : g;
    return x >= 6.f ? V{} : low;
  }
}

}  // namespace
}  // namespace fastadv::rows
