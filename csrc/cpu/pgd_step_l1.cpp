// The PGD step in l1 on the CPU. Formula: fastadv/ops/pgd_step.py.
//
// The k-th largest gradient element is found by a histogram of the leading bits of the magnitudes
// and a selection within the one bin that it falls into: exact, and independent of any order. All
// passes over a sample after the first find it in the caches.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>

#include "cpu/pgd_step.h"
#include "cpu/scratch.h"
#include "cpu/sum.h"

namespace fastadv {
namespace {

// Magnitudes as integers, which are in the same order.
template <class C>
struct Magnitude {
  using Bits = uint32_t;
  static constexpr int kDigitShift = 20;  // 11 leading bits: the exponent and 3 of the fraction
  static constexpr Bits kInfinity = 0x7f800000;
};
template <>
struct Magnitude<double> {
  using Bits = uint64_t;
  static constexpr int kDigitShift = 52;  // 11 leading bits: the exponent
  static constexpr Bits kInfinity = 0x7ff0000000000000;
};
template <class G>
using Bits = typename Magnitude<Compute<G>>::Bits;

constexpr int kBins = 2048;

template <class G>
FASTADV_INLINE Bits<G> magnitude_bits(G grad) {
  return std::bit_cast<Bits<G>>(load(grad)) & (~Bits<G>(0) >> 1);
}

// The elements that move: those of at least `threshold`, `count` of them. None where count is 0.
template <class G>
struct Chosen {
  Bits<G> threshold;
  int64_t count;
};

template <class G>
void fill_histogram(uint32_t* bins, const G* grad, int64_t n) {
  constexpr int kShift = Magnitude<Compute<G>>::kDigitShift;
  std::fill_n(bins, kBins, 0);
  for (int64_t i = 0; i < n; ++i) ++bins[magnitude_bits(grad[i]) >> kShift];
}

// The magnitudes of one bin, in `found`, which has room for one more than there are.
template <class G>
int64_t gather_bin(Bits<G>* found, const G* grad, int64_t n, Bits<G> bin) {
  constexpr int kShift = Magnitude<Compute<G>>::kDigitShift;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits<G> bits = magnitude_bits(grad[i]);
    found[count] = bits;
    count += bits >> kShift == bin;
  }
  return count;
}

// As large as the k-th largest and not zero; none where an element is not finite.
template <class G>
Chosen<G> choose(Bits<G>* scratch, const G* grad, int64_t n, int64_t k) {
  using M = Magnitude<Compute<G>>;
  constexpr int kFinite = M::kInfinity >> M::kDigitShift;
  uint32_t bins[kBins];
  fill_histogram(bins, grad, n);
  if (std::any_of(bins + kFinite, bins + kBins, [](uint32_t count) { return count > 0; })) {
    return {~Bits<G>(0), 0};
  }
  int bin = kFinite - 1;
  int64_t above = 0;
  while (above + bins[bin] < k) above += bins[bin--];
  Bits<G>* end = scratch + gather_bin(scratch, grad, n, Bits<G>(bin));
  Bits<G>* kth = scratch + (k - above - 1);
  std::nth_element(scratch, kth, end, std::greater<>());
  const Bits<G> threshold = std::max<Bits<G>>(*kth, 1);
  above += std::count_if(scratch, end, [&](Bits<G> bits) { return bits >= threshold; });
  return above ? Chosen<G>{threshold, above} : Chosen<G>{~Bits<G>(0), 0};
}

// adv, moved by `share` along the sign of the gradient if it is chosen.
template <class T, class G>
FASTADV_INLINE Compute<T> moved(T adv, G grad, Bits<G> threshold, Compute<T> share) {
  using C = Compute<T>;
  const C step = load(grad) > 0 ? share : -share;
  return load(adv) + (magnitude_bits(grad) >= threshold ? step : C(0));
}

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class C>
void pad(C* distance, int64_t n) {
  std::fill_n(distance + n, padded(n) - n, C(0));
}

// |moved - x| of every element, padded with zeros; returns the largest, but for NaN.
template <class T, class G>
FASTADV_INLINE Compute<T> fill_distances(Compute<T>* distance, const T* adv, const G* grad,
                                         const T* x, Bits<G> threshold, Compute<T> share,
                                         int64_t n) {
  using C = Compute<T>;
  C lanes[kLanes] = {};
  const auto include = [&](int64_t i, int l) __attribute__((always_inline)) {
    const C d = std::abs(moved<T, G>(adv[i], grad[i], threshold, share) - load(x[i]));
    distance[i] = d;
    lanes[l] = d > lanes[l] ? d : lanes[l];
  };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) include(i + l, l);
  }
  for (int64_t i = whole; i < n; ++i) include(i, int(i - whole));
  pad(distance, n);
  C largest = 0;
  for (C lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// A number whose last bit is a multiple of 2^(head - 52) of the largest distance, 2^head >= n: what
// it is added to and subtracted from is rounded to such multiples, of which every sum is exact.
// Doubles, which need all their bits, are left alone.
template <class C>
double summation_grid(C largest, int64_t n) {
  if constexpr (std::is_same_v<C, double>) return 0;
  const uint64_t exponent = std::bit_cast<uint64_t>(double(largest)) >> 52;
  const uint64_t head = std::max(2, int(std::bit_width(uint64_t(n - 1))));
  return std::bit_cast<double>((exponent + 1 + head) << 52 | uint64_t(1) << 51);
}

struct Excess {
  double total;
  int64_t count;
};

// Four lanes, written out because a comparison within a sum keeps compilers from SIMD.
typedef double Doubles __attribute__((vector_size(32)));
typedef int64_t Mask __attribute__((vector_size(32)));

template <class C>
FASTADV_INLINE void load_doubles(Doubles& to, const C* from) {
  typedef C Narrow __attribute__((vector_size(4 * sizeof(C))));
  Narrow values;
  std::memcpy(&values, from, sizeof(values));
  to = __builtin_convertvector(values, Doubles);
}

// Sum and number of the distances that exceed theta, NaN among them. `distance` is padded with
// zeros to a multiple of kLanes.
template <class C>
FASTADV_INLINE Excess sum_above(const C* distance, double theta, double grid, int64_t n) {
  constexpr int kVectors = 4;
  Doubles total[kVectors] = {};
  Mask count[kVectors] = {};
  for (int64_t i = 0; i < n; i += 4 * kVectors) {
    for (int v = 0; v < kVectors; ++v) {
      Doubles term;
      load_doubles(term, distance + i + 4 * v);
      term = (term + grid) - grid;
      const Mask above = ~(term <= theta);
      total[v] += (Doubles)((Mask)term & above);
      count[v] -= above;
    }
  }
  const Doubles sum = (total[0] + total[1]) + (total[2] + total[3]);
  const Mask found = (count[0] + count[1]) + (count[2] + count[3]);
  return {(sum[0] + sum[1]) + (sum[2] + sum[3]), found[0] + found[1] + found[2] + found[3]};
}

// Takes out the distances that do not exceed theta; returns how many are left.
template <class C>
int64_t keep_above(C* distance, double theta, double grid, int64_t n) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const C d = distance[i];
    distance[kept] = d;
    kept += (double(d) + grid) - grid > theta;
  }
  pad(distance, kept);
  return kept;
}

// Michelot's iteration: theta is the mean excess over the distances above it. Overwrites them.
template <class C>
double soft_threshold(C* distance, C largest, double radius, int64_t n) {
  if (!std::isfinite(largest)) return 0;
  const double grid = summation_grid(largest, n);
  Excess now = FASTADV_DISPATCH(sum_above(distance, 0, grid, n));
  if (!(now.total > radius && std::isfinite(now.total))) return 0;
  if (radius == 0) return HUGE_VAL;
  double theta = 0;
  while (true) {
    if (now.count < n / 2) n = keep_above(distance, theta, grid, n);  // theta only grows
    theta = (now.total - radius) / double(now.count);
    const Excess next = FASTADV_DISPATCH(sum_above(distance, theta, grid, n));
    if (next.count == 0 || next.count >= now.count) return theta;
    now = next;
  }
}

template <class T, class G>
FASTADV_INLINE void write_moved(T* out, const T* adv, const G* grad, Bits<G> threshold,
                                Compute<T> share, Limits<Compute<T>> limits, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    store(out[i], clip(moved<T, G>(adv[i], grad[i], threshold, share), limits.low, limits.high));
  }
}

template <class T, class G>
FASTADV_INLINE void write_projected(T* out, const T* adv, const G* grad, const T* x,
                                    Bits<G> threshold, Compute<T> share, double theta,
                                    Limits<Compute<T>> limits, int64_t n) {
  using C = Compute<T>;
  for (int64_t i = 0; i < n; ++i) {
    const C centre = load(x[i]);
    const C delta = moved<T, G>(adv[i], grad[i], threshold, share) - centre;
    C left = C(double(std::abs(delta)) - theta);
    left = left > 0 ? left : C(0);
    store(out[i], clip(centre + (delta < 0 ? -left : left), limits.low, limits.high));
  }
}

template <class T, class G>
void step_l1(T* out, const T* adv, const G* grad, const T* x, Limits<Compute<T>> limits, int64_t k,
             int64_t n) {
  using C = Compute<T>;
  // The magnitudes of a bin, then the distances.
  void* scratch = thread_scratch(padded(n + 1) * int64_t(std::max(sizeof(C), sizeof(Bits<G>))));
  const Chosen<G> chosen = choose(static_cast<Bits<G>*>(scratch), grad, n, k);
  const C share = chosen.count ? C(double(limits.alpha) / double(chosen.count)) : C(0);
  C* distance = static_cast<C*>(scratch);
  const C largest =
      FASTADV_DISPATCH(fill_distances(distance, adv, grad, x, chosen.threshold, share, n));
  const double theta = soft_threshold(distance, largest, limits.eps, n);
  if (theta > 0) {
    FASTADV_DISPATCH(write_projected(out, adv, grad, x, chosen.threshold, share, theta, limits, n));
  } else {
    FASTADV_DISPATCH(write_moved(out, adv, grad, chosen.threshold, share, limits, n));
  }
}

}  // namespace

void pgd_step_l1(const PgdImages& images, const PgdStep& step) {
  const int64_t size = sample_size(images.adv);
  const int64_t spared = int64_t(std::floor(step.sparsity * double(size)));
  const int64_t k = std::max<int64_t>(1, size - spared);
  dispatch_step(images, [&](auto t, auto g) {
    using T = decltype(t);
    using G = decltype(g);
    for_samples<T, G>(images, step,
                      [=](T* out, const T* adv, const G* grad, const T* x, auto limits) {
                        step_l1(out, adv, grad, x, limits, k, size);
                      });
  });
}

}  // namespace fastadv
