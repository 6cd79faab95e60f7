// One row of logits: what the losses on logits are made of. Definitions:
// fastadv/ops/softmax_losses.py.
//
// A row lies in scratch of a whole number of blocks of kRowLanes elements, padded with -inf, so
// that ten classes cost little more than one SIMD register. The arithmetic is written on vectors of
// 32 bytes, which the compiler carries out in the registers of each SIMD level: its own
// vectorisation gives up on these loops. All of it is inlined into functions marked FASTADV_CLONES.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/simd.h"

namespace fastadv {

constexpr int kRowLanes = 16;  // partial sums, the same at every SIMD level

template <class C>
struct LanesOf;
template <>
struct LanesOf<float> {
  using type = float __attribute__((vector_size(32)));
};
template <>
struct LanesOf<double> {
  using type = double __attribute__((vector_size(32)));
};
template <class C>
using Lanes = typename LanesOf<C>::type;
template <class C>
constexpr int kVectorLanes = 32 / int(sizeof(C));

// Shifted logits are cut below it, so that differences of finite logits stay finite.
template <class C>
constexpr C kLowest = sizeof(C) == 4 ? C(-1e30) : C(-1e300);
template <class C>
constexpr C kMinusInfinity = -std::numeric_limits<C>::infinity();

template <class C>
FASTADV_INLINE Lanes<C> lanes_at(const C* from) {
  Lanes<C> to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

template <class C>
FASTADV_INLINE void set_lanes(C* to, Lanes<C> from) {
  std::memcpy(to, &from, sizeof(from));
}

// Lane l of the result is lane kFrom[l].
template <int... kFrom, class V>
FASTADV_INLINE V permuted(V v) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, kFrom...);
#else
  using Order = decltype(v > v);  // GCC has the other builtin from version 12 on only
  return __builtin_shuffle(v, Order{kFrom...});
#endif
}

template <class V>
constexpr int kLanesOf = int(sizeof(V) / sizeof(V{}[0]));

// Lane l is lane l + by, counted around; by is half the lanes, a quarter, an eighth.
template <class V>
FASTADV_INLINE V rotated(V v, int by) {
  if constexpr (kLanesOf<V> == 8) {
    if (by == 4) return permuted<4, 5, 6, 7, 0, 1, 2, 3>(v);
    if (by == 2) return permuted<2, 3, 4, 5, 6, 7, 0, 1>(v);
    return permuted<1, 2, 3, 4, 5, 6, 7, 0>(v);
  } else {
    return by == 2 ? permuted<2, 3, 0, 1>(v) : permuted<1, 2, 3, 0>(v);
  }
}

// A constant in all lanes that the compiler does not see through: GCC finds a maximum, one
// instruction, in `larger` only where both sides are variables.
template <class C>
FASTADV_INLINE Lanes<C> hidden_constant(C value) {
#ifdef __SSE2__
  asm("" : "+x"(value));
#endif
  return Lanes<C>{} + value;
}

// The larger one; b where either is NaN.
template <class C>
FASTADV_INLINE Lanes<C> larger(Lanes<C> a, Lanes<C> b) {
  return a > b ? a : b;
}

// e^x for x <= 0, within 2 units in the last place of a normal number; 0 below -87.7. NaN stays.
FASTADV_INLINE Lanes<float> exp_of_negative(Lanes<float> x) {
  using Bits = uint32_t __attribute__((vector_size(32)));
  constexpr float kVanishing = -88.f, kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // Adding 1.5 * 2^23 rounds to an integer n, which is then in the lowest bits. With 127 more these
  // are the exponent of 2^n; all are 0 for n = -127.
  constexpr float kRound = 12582912.f + 127;
  const Lanes<float> bounded = larger<float>(hidden_constant(kVanishing), x);
  const Lanes<float> rounded = bounded * kLog2E + kRound;
  const Lanes<float> n = rounded - kRound;
  const Lanes<float> r = (bounded - n * kLn2High) - n * kLn2Low;  // n * kLn2High is exact
  // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, fitted to a relative error of e^r of 3e-9
  const Lanes<float> square = r * r;
  const Lanes<float> low = r * .166665211f + .49999994f;
  const Lanes<float> high = square * .00138145394f + (r * .00836874545f + .0416683890f);
  const Lanes<float> e_to_r = (high * square + low) * square + r + 1.f;
  return e_to_r * (Lanes<float>)((Bits)rounded << 23);
}

FASTADV_INLINE Lanes<double> exp_of_negative(Lanes<double> x) {
  for (int l = 0; l < kVectorLanes<double>; ++l) x[l] = std::exp(x[l]);
  return x;
}

// Calls f(i) for the first element i of each vector.
template <class C, class F>
FASTADV_INLINE void for_row(int width, const F& f) {
  for (int i = 0; i < width; i += kVectorLanes<C>) f(i);
}

// The lanes of a vector combined into one value.
template <class V, class G>
FASTADV_INLINE auto fold_lanes(V all, const G& combine) {
  for (int half = kLanesOf<V> / 2; half > 0; half /= 2) all = combine(all, rotated(all, half));
  return all[0];
}

// The vectors term(i) of a row, combined into one value.
template <class C, class F, class G>
FASTADV_INLINE C fold_row(int width, C start, const F& term, const G& combine) {
  constexpr int kStep = kVectorLanes<C>, kVectors = kRowLanes / kStep;
  Lanes<C> partial[kVectors];
  for (int v = 0; v < kVectors; ++v) partial[v] = Lanes<C>{} + start;
  for (int i = 0; i < width; i += kRowLanes) {
    for (int v = 0; v < kVectors; ++v) partial[v] = combine(partial[v], term(i + v * kStep));
  }
  for (int v = 1; v < kVectors; ++v) partial[0] = combine(partial[0], partial[v]);
  return fold_lanes(partial[0], combine);
}

template <class C, class F>
FASTADV_INLINE C sum_row(int width, const F& term) {
  return fold_row(width, C(0), term,
                  [](Lanes<C> a, Lanes<C> b) __attribute__((always_inline)) { return a + b; });
}

// The largest element; NaN are passed over.
template <class C>
FASTADV_INLINE C largest_of(const C* row, int width) {
  const auto at = [&](int i) __attribute__((always_inline)) { return lanes_at(row + i); };
  return fold_row(width, kMinusInfinity<C>, at,
                  [](Lanes<C> a, Lanes<C> b)
                      __attribute__((always_inline)) { return larger<C>(b, a); });
}

// Keeps an element of a row at another value for as long as it lives.
template <class C>
class Replaced {
 public:
  FASTADV_INLINE Replaced(C* at, C value) : at_(at), before_(*at) { *at = value; }
  FASTADV_INLINE ~Replaced() { *at_ = before_; }
  Replaced(const Replaced&) = delete;

 private:
  C* at_;
  C before_;
};

// Where a row is largest.
template <class C>
struct Peak {
  int at;    // the first class with the largest logit; 0 where one is NaN
  C value;   // the largest of those that are not NaN
  bool nan;  // whether one of the logits is NaN, which comparisons pass over
};

template <class C>
FASTADV_INLINE Peak<C> peak_of(const C* row, int width) {
  using Index = decltype(Lanes<C>{} > Lanes<C>{});
  Lanes<C> value = Lanes<C>{} + kMinusInfinity<C>;
  Index here{}, nan{};
  for (int l = 0; l < kVectorLanes<C>; ++l) here[l] = l;
  Index at = here;
  for_row<C>(width, [&](int i) __attribute__((always_inline)) {
    const Lanes<C> v = lanes_at(row + i);
    at = v > value ? here : at;
    value = larger<C>(v, value);
    nan |= v != v;
    here += kVectorLanes<C>;
  });
  const C largest = fold_lanes(
      value, [](auto a, auto b) __attribute__((always_inline)) { return larger<C>(a, b); });
  const Index candidates = value == largest ? at : here;
  // A NaN is marked by -1, which is less than any class.
  const int first =
      int(fold_lanes(candidates | nan,
                     [](auto a, auto b) __attribute__((always_inline)) { return a < b ? a : b; }));
  return {std::max(first, 0), largest, first < 0};
}

// Softmax of a row.
template <class C>
struct Softmax {
  C* shifted;  // logits less the largest of them, over the temperature
  C* powers;   // e to the power of them
  C largest, inverse_sum, log_sum;

  FASTADV_INLINE void compute(const C* logits, int width, C temperature) {
    largest = largest_of(logits, width);
    const C high = largest, inverse_temperature = 1 / temperature;
    const Lanes<C> lowest = hidden_constant(kLowest<C>);
    set_sum(sum_row<C>(width, [&](int i) __attribute__((always_inline)) {
      const Lanes<C> v = larger<C>(lowest, (lanes_at(logits + i) - high) * inverse_temperature);
      const Lanes<C> power = exp_of_negative(v);
      set_lanes(shifted + i, v);
      set_lanes(powers + i, power);
      return power;
    }));
  }
  FASTADV_INLINE void set_sum(C sum) {  // of the powers
    log_sum = std::log(sum);
    inverse_sum = 1 / sum;
  }
  // Probabilities from class i on, and their logarithms.
  FASTADV_INLINE Lanes<C> share(int i) const { return lanes_at<C>(powers + i) * inverse_sum; }
  FASTADV_INLINE Lanes<C> log_share(int i) const { return lanes_at<C>(shifted + i) - log_sum; }
  FASTADV_INLINE C p(int of_class) const { return powers[of_class] * inverse_sum; }
  FASTADV_INLINE C log_p(int of_class) const { return shifted[of_class] - log_sum; }
};

// KL(p || q).
template <class C>
FASTADV_INLINE C divergence(const Softmax<C>& p, const Softmax<C>& q, int width) {
  return sum_row<C>(width, [&](int i) __attribute__((always_inline)) {
    return p.share(i) * (p.log_share(i) - q.log_share(i));
  });
}

// The gradient of KL(p || q) = `value` in the logits of p; in those of q it is q - p.
template <class C>
FASTADV_INLINE Lanes<C> divergence_slope(const Softmax<C>& p, const Softmax<C>& q, C value, int i) {
  return p.share(i) * (p.log_share(i) - q.log_share(i) - value);
}

}  // namespace fastadv
