// The losses on logits, one row each: value and gradients. Definitions and sources:
// fastadv/ops/softmax_losses.py and fastadv/losses.py.
#pragma once

#include <algorithm>

#include "cpu/softmax_rows.h"

namespace fastadv {

constexpr int kScratchRows = 12;

// One row of the two logits and the space to work on it.
template <class C>
struct Row {
  C* scratch;  // kScratchRows rows of `width`
  int classes, width, y;
  C weight, temperature;
  C loss, other_loss;  // results; the second is ACT's alone

  FASTADV_INLINE C* at(int row) const { return scratch + int64_t(row) * width; }
  FASTADV_INLINE C* logits() const { return at(0); }
  FASTADV_INLINE C* other() const { return at(1); }
  FASTADV_INLINE C* gradient() const { return at(2); }
  FASTADV_INLINE C* other_gradient() const { return at(3); }
  // The softmax of a row of logits, in the scratch of number 0 .. 3.
  FASTADV_INLINE Softmax<C> softmax(int number, const C* of, C at_temperature = 1) const {
    Softmax<C> result{at(4 + 2 * number), at(5 + 2 * number), 0, 0, 0};
    result.compute(of, width, at_temperature);
    return result;
  }
};

// to(i) = of(i) for the vectors of a row.
template <class C, class F>
FASTADV_INLINE void fill_row(C* to, int width, const F& of) {
  for_row<C>(width, [&](int i) __attribute__((always_inline)) { set_lanes<C>(to + i, of(i)); });
}

struct CrossEntropy {  // weight: label smoothing
  template <class C>
  static FASTADV_INLINE void row(Row<C>& r) {
    const Softmax<C> p = r.softmax(0, r.logits());
    const C share = r.weight / C(r.classes);
    C* g = r.gradient();
    r.loss = -p.log_p(r.y);
    fill_row(g, r.width, [&](int i) __attribute__((always_inline)) { return p.share(i) - share; });
    g[r.y] -= 1 - r.weight;
    if (r.weight == 0) return;
    for (int i = r.classes; i < r.width; ++i) p.shifted[i] = p.log_sum;  // adds nothing to the sum
    const C all =
        sum_row<C>(r.width, [&](int i) __attribute__((always_inline)) { return p.log_share(i); });
    r.loss = (1 - r.weight) * r.loss - share * all;
  }
};

// MART's boosted cross-entropy of q, the softmax of these logits; softmax number `spare` is
// overwritten.
template <class C>
FASTADV_INLINE C boosted(const Row<C>& r, C* logits, const Softmax<C>& q, int spare, C* g) {
  int best;
  {
    const Replaced<C> hidden(logits + r.y, kMinusInfinity<C>);
    best = peak_of(logits, r.width).at;
  }
  if (best == r.y) best = r.y ? 0 : 1;  // all others are NaN or minus infinity
  const C q_best = q.p(best);
  const Replaced<C> without(q.powers + best, C(0));
  const C sum = sum_row<C>(
      r.width, [&](int i) __attribute__((always_inline)) { return lanes_at(q.powers + i); });
  Softmax<C> rest = q;  // the softmax without class `best`
  rest.set_sum(sum);
  C log_rest = rest.log_sum - q.log_sum;  // log(1 - q_best)
  if (sum < C(1e-12)) {                   // next to `best`, powers of the rest may have vanished
    const Replaced<C> hidden(logits + best, kMinusInfinity<C>);
    rest = r.softmax(spare, logits);
    log_rest = std::max(rest.largest - q.largest, kLowest<C>) + rest.log_sum - q.log_sum;
  }
  fill_row(g, r.width, [&](int i) __attribute__((always_inline)) {
    return q.share(i) - q_best * rest.share(i);
  });
  g[best] = 2 * q_best;  // q.share is without it here
  g[r.y] -= 1;
  return -q.log_p(r.y) - log_rest;
}

struct BoostedCrossEntropy {
  template <class C>
  static FASTADV_INLINE void row(Row<C>& r) {
    const Softmax<C> q = r.softmax(0, r.logits());
    r.loss = boosted(r, r.logits(), q, 1, r.gradient());
  }
};

// Sets loss and gradient to 0, or to NaN.
template <class C>
FASTADV_INLINE void clear(Row<C>& r, bool to_nan) {
  r.loss = to_nan ? std::numeric_limits<C>::quiet_NaN() : C(0);
  fill_row(r.gradient(), r.width,
           [&](int) __attribute__((always_inline)) { return Lanes<C>{} + r.loss; });
}

struct Margin {  // Carlini and Wagner's
  template <class C>
  static FASTADV_INLINE void row(Row<C>& r) {
    C *z = r.logits(), *g = r.gradient();
    const C own = z[r.y];
    const Replaced<C> hidden(z + r.y, kMinusInfinity<C>);
    const Peak<C> best = peak_of(z, r.width);
    clear(r, best.nan || own != own);
    r.loss += best.value - own;
    g[best.at] += 1;
    g[r.y] -= 1;
  }
};

struct LogitsRatio {  // DLR
  template <class C>
  static FASTADV_INLINE void row(Row<C>& r) {
    C *z = r.logits(), *g = r.gradient();
    const C own = z[r.y];
    const Peak<C> first = peak_of(z, r.width);
    const Replaced<C> without_first(z + first.at, kMinusInfinity<C>);
    const Peak<C> second = peak_of(z, r.width);
    const Replaced<C> without_second(z + second.at, kMinusInfinity<C>);
    const Peak<C> third = peak_of(z, r.width);
    const Peak<C> best = first.at == r.y ? second : first;
    const C inverse_span = 1 / (first.value - third.value + C(1e-12));
    clear(r, first.nan);
    r.loss += (best.value - own) * inverse_span;
    g[best.at] += inverse_span;
    g[r.y] -= inverse_span;
    g[first.at] -= r.loss * inverse_span;
    g[third.at] += r.loss * inverse_span;
  }
};

struct Divergence {  // KL(logits || other) at a temperature, times its square
  template <class C>
  static FASTADV_INLINE void row(Row<C>& r) {
    const C t = r.temperature;
    const Softmax<C> p = r.softmax(0, r.logits(), t), q = r.softmax(1, r.other(), t);
    const C value = divergence(p, q, r.width);
    r.loss = t * t * value;
    fill_row(r.gradient(), r.width, [&](int i) __attribute__((always_inline)) {
      return t * divergence_slope(p, q, value, i);
    });
    fill_row(r.other_gradient(), r.width,
             [&](int i) __attribute__((always_inline)) { return t * (q.share(i) - p.share(i)); });
  }
};

struct Trades {
  template <class C>
  static FASTADV_INLINE void row(Row<C>& r) {
    const Softmax<C> p = r.softmax(0, r.logits()), q = r.softmax(1, r.other());
    const C value = divergence(p, q, r.width), weight = r.weight;
    r.loss = weight * value - p.log_p(r.y);
    fill_row(r.gradient(), r.width, [&](int i) __attribute__((always_inline)) {
      return p.share(i) + weight * divergence_slope(p, q, value, i);
    });
    fill_row(r.other_gradient(), r.width, [&](int i) __attribute__((always_inline)) {
      return weight * (q.share(i) - p.share(i));
    });
    r.gradient()[r.y] -= 1;
  }
};

struct Mart {
  template <class C>
  static FASTADV_INLINE void row(Row<C>& r) {
    const Softmax<C> p = r.softmax(0, r.logits()), q = r.softmax(1, r.other());
    const C value = divergence(p, q, r.width), weight = r.weight, p_y = p.p(r.y);
    C *g = r.gradient(), *h = r.other_gradient();
    C doubt;  // 1 - p_y as a sum, which does not cancel
    {
      const Replaced<C> hidden(p.powers + r.y, C(0));
      doubt = sum_row<C>(r.width, [&](int i) __attribute__((always_inline)) { return p.share(i); });
    }
    const C of_doubt = value * p_y;
    fill_row(g, r.width, [&](int i) __attribute__((always_inline)) {
      return weight * (doubt * divergence_slope(p, q, value, i) + of_doubt * p.share(i));
    });
    const C slope_at_y = p_y * (p.log_p(r.y) - q.log_p(r.y) - value);
    g[r.y] = weight * doubt * (slope_at_y - of_doubt);
    r.loss = boosted(r, r.other(), q, 2, h) + weight * value * doubt;
    const C pull = weight * doubt;
    fill_row(h, r.width, [&](int i) __attribute__((always_inline)) {
      return lanes_at(h + i) + pull * (q.share(i) - p.share(i));
    });
  }
};

struct LogitPairing {  // ALP
  template <class C>
  static FASTADV_INLINE void row(Row<C>& r) {
    const Softmax<C> p = r.softmax(0, r.logits()), q = r.softmax(1, r.other());
    C *a = r.logits(), *b = r.other();
    for (int i = r.classes; i < r.width; ++i) a[i] = b[i] = 0;  // the padding is not apart
    const auto apart = [&](int i) __attribute__((always_inline)) {
      return lanes_at(a + i) - lanes_at(b + i);
    };
    const C square = sum_row<C>(
        r.width, [&](int i) __attribute__((always_inline)) { return apart(i) * apart(i); });
    const C pull = 2 * r.weight / C(r.classes), half = C(.5);
    r.loss = -(p.log_p(r.y) + q.log_p(r.y)) / 2 + r.weight * square / C(r.classes);
    fill_row(r.gradient(), r.width, [&](int i) __attribute__((always_inline)) {
      return half * p.share(i) + pull * apart(i);
    });
    fill_row(r.other_gradient(), r.width, [&](int i) __attribute__((always_inline)) {
      return half * q.share(i) - pull * apart(i);
    });
    r.gradient()[r.y] -= half;
    r.other_gradient()[r.y] -= half;
  }
};

struct Cooperative {  // ACT: the loss of each of the two models
  template <class C>
  static FASTADV_INLINE void row(Row<C>& r) {
    const C t = r.temperature, weight = r.weight, hard = 1 - weight;
    const Softmax<C> p = r.softmax(0, r.logits()), q = r.softmax(1, r.other());
    const bool soft = t != 1;
    const Softmax<C> p_soft = soft ? r.softmax(2, r.logits(), t) : p;
    const Softmax<C> q_soft = soft ? r.softmax(3, r.other(), t) : q;
    r.loss = weight * t * t * divergence(q_soft, p_soft, r.width) - hard * p.log_p(r.y);
    r.other_loss = weight * t * t * divergence(p_soft, q_soft, r.width) - hard * q.log_p(r.y);
    const C pull = weight * t;
    fill_row(r.gradient(), r.width, [&](int i) __attribute__((always_inline)) {
      return hard * p.share(i) + pull * (p_soft.share(i) - q_soft.share(i));
    });
    fill_row(r.other_gradient(), r.width, [&](int i) __attribute__((always_inline)) {
      return hard * q.share(i) + pull * (q_soft.share(i) - p_soft.share(i));
    });
    r.gradient()[r.y] -= hard;
    r.other_gradient()[r.y] -= hard;
  }
};

}  // namespace fastadv
