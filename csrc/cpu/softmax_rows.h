// Operations on one row of logits, of which the losses on logits are made. Definitions:
// fastadv/ops/softmax_formulas.py.
//
// A row lies in scratch of a whole number of blocks of kRowLanes elements, padded with -inf, so
// that ten classes cost little more than one SIMD register. The arithmetic is written on the
// vectors V of csrc/cpu/vectors.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/vectors.h"

namespace fastadv {

constexpr int kRowLanes = 16;            // partial sums, the same at every SIMD level
constexpr int kSummed = 32 * kRowLanes;  // elements that are added up in the dtype of computation

// Shifted logits are cut below it, so that differences of finite logits stay finite.
template <class C>
constexpr C kLowest = sizeof(C) == 4 ? C(-1e30) : C(-1e300);
template <class C>
constexpr C kMinusInfinity = -std::numeric_limits<C>::infinity();

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

// Lane l is lane l + kBy, counted around.
template <int kBy, class V>
FASTADV_INLINE V rotated(V v) {
  return [&]<int... kLane>(std::integer_sequence<int, kLane...>) __attribute__((always_inline)) {
    return permuted<(kLane + kBy) % kLanesOf<V>...>(v);
  }(std::make_integer_sequence<int, kLanesOf<V>>{});
}

// Calls f(i) for the first element i of each vector.
template <class V, class F>
FASTADV_INLINE void for_row(int width, const F& f) {
  for (int i = 0; i < width; i += kLanesOf<V>) f(i);
}

// The lanes of a vector combined into one value.
template <class V, class G, int kHalf = kLanesOf<V> / 2>
FASTADV_INLINE Element<V> fold_lanes(V all, const G& combine) {
  all = combine(all, rotated<kHalf>(all));
  if constexpr (kHalf > 1) return fold_lanes<V, G, kHalf / 2>(all, combine);
  return all[0];
}

// The vectors term(i) of the elements `begin` to `end` of a row, combined into one value.
template <class V, class F, class G>
FASTADV_INLINE Element<V> fold_row(int begin, int end, Element<V> start, const F& term,
                                   const G& combine) {
  constexpr int kStep = kLanesOf<V>, kVectors = kRowLanes / kStep;
  V partial[kVectors];
  for (int v = 0; v < kVectors; ++v) partial[v] = V{} + start;
  for (int i = begin; i < end; i += kRowLanes) {
    for (int v = 0; v < kVectors; ++v) partial[v] = combine(partial[v], term(i + v * kStep));
  }
  for (int v = 1; v < kVectors; ++v) partial[0] = combine(partial[0], partial[v]);
  return fold_lanes(partial[0], combine);
}

// The error of a sum would grow with the number of classes, so runs of them are added up in double.
template <class V, class F>
FASTADV_INLINE Element<V> sum_row(int width, const F& term) {
  double sum = 0;
  for (int begin = 0; begin < width; begin += kSummed) {
    sum += fold_row<V>(begin, std::min(width, begin + kSummed), 0, term,
                       [](V a, V b) __attribute__((always_inline)) { return a + b; });
  }
  return Element<V>(sum);
}

// The largest element that is not NaN.
template <class V>
FASTADV_INLINE Element<V> largest_of(const Element<V>* row, int width) {
  const auto at = [&](int i) __attribute__((always_inline)) { return lanes_at<V>(row + i); };
  return fold_row<V>(0, width, kMinusInfinity<Element<V>>, at,
                     [](V a, V b) __attribute__((always_inline)) { return larger(b, a); });
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

// The largest logit of a row and its class.
template <class C>
struct Peak {
  int at;    // the first class with the largest logit; 0 where one is NaN
  C value;   // the largest of those that are not NaN
  bool nan;  // whether one of the logits is NaN, which comparisons pass over
};

template <class V>
FASTADV_INLINE Peak<Element<V>> peak_of(const Element<V>* row, int width) {
  using Index = decltype(V{} > V{});
  V value = V{} + kMinusInfinity<Element<V>>;
  Index here{}, nan{};
  for (int l = 0; l < kLanesOf<V>; ++l) here[l] = l;
  Index at = here;
  for_row<V>(width, [&](int i) __attribute__((always_inline)) {
    const V v = lanes_at<V>(row + i);
    at = v > value ? here : at;
    value = larger(v, value);
    nan |= v != v;
    here += kLanesOf<V>;
  });
  const Element<V> largest =
      fold_lanes(value, [](V a, V b) __attribute__((always_inline)) { return larger(a, b); });
  const Index candidates = value == largest ? at : here;
  // A NaN is marked by -1, which is less than any class.
  const int first =
      int(fold_lanes(candidates | nan, [](Index a, Index b) __attribute__((always_inline)) {
        return a < b ? a : b;
      }));
  return {std::max(first, 0), largest, first < 0};
}

// Memory that is needed next: a row of logits, and where a gradient goes. Rows lie in pages of
// their own, which no processor fetches by itself ahead of the first access.
struct Upcoming {
  uintptr_t logits = 0, gradient = 0;
  int logit_bytes = 0, gradient_bytes = 0;  // of an element

  FASTADV_INLINE void fetch(int i) const {
    __builtin_prefetch(reinterpret_cast<const void*>(logits + i * logit_bytes));
    __builtin_prefetch(reinterpret_cast<const void*>(gradient + i * gradient_bytes), 1);
  }
};

// A row of logits and the largest of them that is not NaN.
template <class C>
struct Logits {
  C* at;
  C largest = 0;
  Upcoming upcoming = {};  // fetched while exponentials are computed
};

// Softmax of a row.
template <class V>
struct Softmax {
  using C = Element<V>;

  C* shifted;  // logits less the largest of them, over the temperature
  C* powers;   // e to the power of them
  C largest, inverse_sum, log_sum;

  FASTADV_INLINE void compute(const Logits<C>& logits, int width, C temperature) {
    largest = logits.largest;
    const C high = largest, inverse_temperature = 1 / temperature;
    const V lowest = hidden_constant<V>(kLowest<C>);
    set_sum(sum_row<V>(width, [&](int i) __attribute__((always_inline)) {
      logits.upcoming.fetch(i);
      const V v = larger(lowest, V((lanes_at<V>(logits.at + i) - high) * inverse_temperature));
      const V power = exp_of_negative(v);
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
  FASTADV_INLINE V share(int i) const { return lanes_at<V>(powers + i) * inverse_sum; }
  FASTADV_INLINE V log_share(int i) const { return lanes_at<V>(shifted + i) - log_sum; }
  FASTADV_INLINE C p(int of_class) const { return powers[of_class] * inverse_sum; }
  FASTADV_INLINE C log_p(int of_class) const { return shifted[of_class] - log_sum; }
};

// log p - log q - less, from class i on.
template <class V>
FASTADV_INLINE V log_ratio(const Softmax<V>& p, const Softmax<V>& q, Element<V> less, int i) {
  return lanes_at<V>(p.shifted + i) - lanes_at<V>(q.shifted + i) - (p.log_sum - q.log_sum + less);
}

// KL(p || q).
template <class V>
FASTADV_INLINE Element<V> divergence(const Softmax<V>& p, const Softmax<V>& q, int width) {
  return sum_row<V>(width, [&](int i) __attribute__((always_inline)) {
    return p.share(i) * log_ratio(p, q, Element<V>(0), i);
  });
}

// The gradient of KL(p || q) = `value` in the logits of p; in those of q it is q - p.
template <class V>
FASTADV_INLINE V divergence_slope(const Softmax<V>& p, const Softmax<V>& q, Element<V> value,
                                  int i) {
  return p.share(i) * log_ratio(p, q, value, i);
}

}  // namespace fastadv
