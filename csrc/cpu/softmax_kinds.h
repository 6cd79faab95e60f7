// The losses on logits, one row each: value and gradients. Definitions and sources:
// fastadv/ops/softmax_formulas.py and fastadv/losses/.
#pragma once

#include <algorithm>

#include "cpu/softmax_rows.h"

namespace fastadv {

constexpr int kScratchRows = 8;

// One row of the two logits, the space to work on it, and where its results go.
template <class V>
struct Row {
  using C = Element<V>;

  Logits<C> logits, other;  // of `width`
  C* scratch;               // kScratchRows rows of `width`
  int classes, width, y = 0;
  C weight, temperature;
  C *gradient, *other_gradient;  // null where they are not wanted
  C gradient_scale;              // which all that is written to them is multiplied by
  C loss = 0, other_loss = 0;    // the second is ACT's alone

  FASTADV_INLINE C* at(int row) const { return scratch + int64_t(row) * width; }
  // The softmax of a row of logits, in the scratch of number 0 .. 3.
  FASTADV_INLINE Softmax<V> softmax(int number, const Logits<C>& of, C at_temperature = 1) const {
    Softmax<V> result{at(2 * number), at(2 * number + 1), 0, 0, 0};
    result.compute(of, width, at_temperature);
    return result;
  }

  // Writes a gradient: of(i) are its elements from class i on.
  template <class F>
  FASTADV_INLINE void write(C* to, const F& of) const {
    if (!to) return;
    const int whole = classes / kLanesOf<V> * kLanesOf<V>;
    for (int i = 0; i < whole; i += kLanesOf<V>) set_lanes<V>(to + i, gradient_scale * of(i));
    if (whole == classes) return;
    C rest[kLanesOf<V>];
    set_lanes<V>(rest, gradient_scale * of(whole));
    for (int i = whole; i < classes; ++i) to[i] = rest[i - whole];
  }
  // One element of a gradient that has been written: another value, or a term more.
  FASTADV_INLINE void set(C* to, int of_class, C value) const {
    if (to) to[of_class] = gradient_scale * value;
  }
  FASTADV_INLINE void add(C* to, int of_class, C value) const {
    if (to) to[of_class] += gradient_scale * value;
  }
};

struct CrossEntropy {  // weight: label smoothing
  template <class V, class C = Element<V>>
  static FASTADV_INLINE void row(Row<V>& r) {
    const Softmax<V> p = r.softmax(0, r.logits);
    const C share = r.weight / C(r.classes);
    r.write(r.gradient, [&](int i) __attribute__((always_inline)) { return p.share(i) - share; });
    r.add(r.gradient, r.y, r.weight - 1);
    r.loss = -p.log_p(r.y);
    if (r.weight == 0) return;
    for (int i = r.classes; i < r.width; ++i) p.shifted[i] = p.log_sum;  // adds nothing to the sum
    const C all =
        sum_row<V>(r.width, [&](int i) __attribute__((always_inline)) { return p.log_share(i); });
    r.loss = (1 - r.weight) * r.loss - share * all;
  }
};

// MART's boosted cross-entropy of q, the softmax of a row of logits.
template <class V>
struct Boosted {
  using C = Element<V>;

  Softmax<V> q, rest;  // `rest` is the softmax without class `best`, at which it must not be asked
  int best;            // the likeliest of the wrong classes
  C q_best, loss;

  // Softmax number `spare` is overwritten.
  FASTADV_INLINE Boosted(const Row<V>& r, const Logits<C>& logits, const Softmax<V>& of, int spare)
      : q(of), rest(of) {
    {
      const Replaced<C> hidden(logits.at + r.y, kMinusInfinity<C>);
      best = peak_of<V>(logits.at, r.width).at;
    }
    if (best == r.y) best = r.y ? 0 : 1;  // all others are NaN or minus infinity
    q_best = q.p(best);
    C sum;
    {
      const Replaced<C> without(q.powers + best, C(0));
      sum = sum_row<V>(
          r.width, [&](int i) __attribute__((always_inline)) { return lanes_at<V>(q.powers + i); });
    }
    rest.set_sum(sum);
    C log_rest = rest.log_sum - q.log_sum;  // log(1 - q_best)
    if (sum < C(1e-12)) {                   // next to `best`, powers of the rest may have vanished
      const Replaced<C> hidden(logits.at + best, kMinusInfinity<C>);
      const C largest = largest_of<V>(logits.at, r.width);
      rest = r.softmax(spare, {logits.at, largest, logits.upcoming});
      log_rest = std::max(rest.largest - q.largest, kLowest<C>) + rest.log_sum - q.log_sum;
    }
    loss = -q.log_p(r.y) - log_rest;
  }

  // The gradient, but for -1 at the label: from class i on, and at `best`.
  FASTADV_INLINE V slope(int i) const { return q.share(i) - q_best * rest.share(i); }
  FASTADV_INLINE C slope_at_best() const { return 2 * q_best; }
};

struct BoostedCrossEntropy {
  template <class V>
  static FASTADV_INLINE void row(Row<V>& r) {
    const Boosted<V> boosted(r, r.logits, r.softmax(0, r.logits), 1);
    r.write(r.gradient, [&](int i) __attribute__((always_inline)) { return boosted.slope(i); });
    r.set(r.gradient, boosted.best, boosted.slope_at_best());
    r.add(r.gradient, r.y, -1);
    r.loss = boosted.loss;
  }
};

// Sets loss and gradient to 0, or to NaN.
template <class V, class C = Element<V>>
FASTADV_INLINE void clear(Row<V>& r, bool to_nan) {
  r.loss = to_nan ? std::numeric_limits<C>::quiet_NaN() : C(0);
  r.write(r.gradient, [&](int) __attribute__((always_inline)) { return V{} + r.loss; });
}

struct Margin {  // Carlini and Wagner's
  template <class V, class C = Element<V>>
  static FASTADV_INLINE void row(Row<V>& r) {
    C* z = r.logits.at;
    const C own = z[r.y];
    const Replaced<C> hidden(z + r.y, kMinusInfinity<C>);
    const Peak<C> best = peak_of<V>(z, r.width);
    clear(r, best.nan || own != own);
    r.loss += best.value - own;
    r.add(r.gradient, best.at, 1);
    r.add(r.gradient, r.y, -1);
  }
};

struct LogitsRatio {  // DLR
  template <class V, class C = Element<V>>
  static FASTADV_INLINE void row(Row<V>& r) {
    C *z = r.logits.at, *g = r.gradient;
    const C own = z[r.y];
    const Peak<C> first = peak_of<V>(z, r.width);
    const Replaced<C> without_first(z + first.at, kMinusInfinity<C>);
    const Peak<C> second = peak_of<V>(z, r.width);
    const Replaced<C> without_second(z + second.at, kMinusInfinity<C>);
    const Peak<C> third = peak_of<V>(z, r.width);
    const Peak<C> best = first.at == r.y ? second : first;
    const C inverse_span = 1 / (first.value - third.value + C(1e-12));
    clear(r, first.nan);
    r.loss += (best.value - own) * inverse_span;
    r.add(g, best.at, inverse_span);
    r.add(g, r.y, -inverse_span);
    r.add(g, first.at, -r.loss * inverse_span);
    r.add(g, third.at, r.loss * inverse_span);
  }
};

struct Divergence {  // KL(logits || other) at a temperature, times its square
  template <class V, class C = Element<V>>
  static FASTADV_INLINE void row(Row<V>& r) {
    const C t = r.temperature;
    const Softmax<V> p = r.softmax(0, r.logits, t), q = r.softmax(1, r.other, t);
    const C value = divergence(p, q, r.width);
    r.loss = t * t * value;
    r.write(r.gradient, [&](int i) __attribute__((always_inline)) {
      return t * divergence_slope(p, q, value, i);
    });
    r.write(r.other_gradient,
            [&](int i) __attribute__((always_inline)) { return t * (q.share(i) - p.share(i)); });
  }
};

struct Trades {
  template <class V, class C = Element<V>>
  static FASTADV_INLINE void row(Row<V>& r) {
    const Softmax<V> p = r.softmax(0, r.logits), q = r.softmax(1, r.other);
    const C value = divergence(p, q, r.width), weight = r.weight;
    r.loss = weight * value - p.log_p(r.y);
    r.write(r.gradient, [&](int i) __attribute__((always_inline)) {
      return p.share(i) + weight * divergence_slope(p, q, value, i);
    });
    r.add(r.gradient, r.y, -1);
    r.write(r.other_gradient, [&](int i) __attribute__((always_inline)) {
      return weight * (q.share(i) - p.share(i));
    });
  }
};

struct Mart {
  template <class V, class C = Element<V>>
  static FASTADV_INLINE void row(Row<V>& r) {
    const Softmax<V> p = r.softmax(0, r.logits), q = r.softmax(1, r.other);
    const C value = divergence(p, q, r.width), weight = r.weight, p_y = p.p(r.y);
    C doubt;  // 1 - p_y as a sum, which does not cancel
    {
      const Replaced<C> hidden(p.powers + r.y, C(0));
      doubt = sum_row<V>(r.width, [&](int i) __attribute__((always_inline)) { return p.share(i); });
    }
    const C of_doubt = value * p_y, pull = weight * doubt;
    r.write(r.gradient, [&](int i) __attribute__((always_inline)) {
      return weight * (doubt * divergence_slope(p, q, value, i) + of_doubt * p.share(i));
    });
    const C slope_at_y = p_y * (p.log_p(r.y) - q.log_p(r.y) - value);
    r.set(r.gradient, r.y, pull * (slope_at_y - of_doubt));
    const Boosted<V> boosted(r, r.other, q, 2);
    r.loss = boosted.loss + value * pull;
    r.write(r.other_gradient, [&](int i) __attribute__((always_inline)) {
      return boosted.slope(i) + pull * (q.share(i) - p.share(i));
    });
    const int best = boosted.best;
    r.set(r.other_gradient, best, boosted.slope_at_best() + pull * (boosted.q_best - p.p(best)));
    r.add(r.other_gradient, r.y, -1);
  }
};

struct LogitPairing {  // ALP
  template <class V, class C = Element<V>>
  static FASTADV_INLINE void row(Row<V>& r) {
    const Softmax<V> p = r.softmax(0, r.logits), q = r.softmax(1, r.other);
    C *a = r.logits.at, *b = r.other.at;
    for (int i = r.classes; i < r.width; ++i) a[i] = b[i] = 0;  // the padding is not apart
    const auto apart = [&](int i) __attribute__((always_inline)) {
      return lanes_at<V>(a + i) - lanes_at<V>(b + i);
    };
    const C square = sum_row<V>(
        r.width, [&](int i) __attribute__((always_inline)) { return apart(i) * apart(i); });
    const C pull = 2 * r.weight / C(r.classes), half = C(.5);
    r.loss = -(p.log_p(r.y) + q.log_p(r.y)) / 2 + r.weight * square / C(r.classes);
    r.write(r.gradient, [&](int i) __attribute__((always_inline)) {
      return half * p.share(i) + pull * apart(i);
    });
    r.add(r.gradient, r.y, -half);
    r.write(r.other_gradient, [&](int i) __attribute__((always_inline)) {
      return half * q.share(i) - pull * apart(i);
    });
    r.add(r.other_gradient, r.y, -half);
  }
};

struct Cooperative {  // ACT: the loss of each of the two models
  template <class V, class C = Element<V>>
  static FASTADV_INLINE void row(Row<V>& r) {
    const C t = r.temperature, weight = r.weight, hard = 1 - weight;
    const Softmax<V> p = r.softmax(0, r.logits), q = r.softmax(1, r.other);
    const bool soft = t != 1;
    const Softmax<V> p_soft = soft ? r.softmax(2, r.logits, t) : p;
    const Softmax<V> q_soft = soft ? r.softmax(3, r.other, t) : q;
    r.loss = weight * t * t * divergence(q_soft, p_soft, r.width) - hard * p.log_p(r.y);
    r.other_loss = weight * t * t * divergence(p_soft, q_soft, r.width) - hard * q.log_p(r.y);
    const C pull = weight * t;
    r.write(r.gradient, [&](int i) __attribute__((always_inline)) {
      return hard * p.share(i) + pull * (p_soft.share(i) - q_soft.share(i));
    });
    r.add(r.gradient, r.y, -hard);
    r.write(r.other_gradient, [&](int i) __attribute__((always_inline)) {
      return hard * q.share(i) + pull * (q_soft.share(i) - p_soft.share(i));
    });
    r.add(r.other_gradient, r.y, -hard);
  }
};

template <class... Kinds>
struct KindList {
  // The place of a kind, by which `rows_of` knows it.
  template <class Kind>
  static constexpr int number_of() {
    static_assert((std::is_same_v<Kind, Kinds> || ...), "the list must have the kind");
    int number = 0;
    ((std::is_same_v<Kind, Kinds> || (++number, false)) || ...);
    return number;
  }
};

using SoftmaxKinds = KindList<CrossEntropy, BoostedCrossEntropy, Margin, LogitsRatio, Divergence,
                              Trades, Mart, LogitPairing, Cooperative>;

}  // namespace fastadv
