// Exact projections for FAB and for attacks in l1. Schemas and meanings:
// fastadv/attacks/projections.py.
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace fastadv {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLargest = std::numeric_limits<double>::max();

// A term of a sum: amount * min(t, cap).
struct Term {
  double cap, amount;
};

// The smallest t >= 0 at which the terms add up to the target, infinite where they never do. The
// sum must not fall as t grows. The terms are reordered: those with caps on the wrong side of a
// pivot are left out again and again, so that it takes a few passes, not a sort.
double solve_level(Term* terms, int64_t count, double target) {
  double base = 0;   // what the terms left out below add up to
  double slope = 0;  // amounts of the terms left out above, whose caps exceed t
  double best = kInfinity;
  bool reached = false;
  while (count > 0) {
    const double a = terms[0].cap, b = terms[count / 2].cap, c = terms[count - 1].cap;
    const double pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    // [0, below) have smaller caps, [below, above) the pivot's.
    int64_t below = 0, above = count;
    double below_sum = 0, equal_amount = 0, above_amount = 0;
    for (int64_t i = 0; i < above;) {
      if (terms[i].cap < pivot) {
        below_sum += terms[i].amount * terms[i].cap;
        std::swap(terms[i++], terms[below++]);
      } else if (terms[i].cap > pivot) {
        above_amount += terms[i].amount;
        std::swap(terms[i], terms[--above]);
      } else {
        equal_amount += terms[i++].amount;
      }
    }
    const double at_pivot = base + below_sum + (equal_amount + above_amount + slope) * pivot;
    if (at_pivot >= target) {
      reached = true;
      best = pivot;
      slope += equal_amount + above_amount;
      count = below;
    } else {
      base += below_sum + equal_amount * pivot;
      terms += above;
      count -= above;
    }
  }
  // t lies between two caps, of which the upper one is the best pivot.
  if (!reached) return kInfinity;
  if (slope <= 0) return best;
  return std::min(std::max((target - base) / slope, 0.0), best);
}

at::Tensor water_level(const at::Tensor& amounts, const at::Tensor& caps,
                       const at::Tensor& target) {
  check_shape(caps, "caps", amounts, "amounts");
  TORCH_CHECK_VALUE(amounts.dim() == 2 && target.dim() == 1 && target.size(0) == amounts.size(0),
                    "amounts must have axes [B, N] and target [B], got ", amounts.sizes(), " and ",
                    target.sizes());
  const at::Tensor a = amounts.to(at::kDouble).contiguous(), c = caps.to(at::kDouble).contiguous();
  const at::Tensor wanted = target.to(at::kDouble).contiguous();
  const int64_t rows = a.size(0), size = a.size(1);
  at::Tensor result = at::empty({rows, 1}, a.options());
  const double *from = a.const_data_ptr<double>(), *cap = c.const_data_ptr<double>();
  const double* goal = wanted.const_data_ptr<double>();
  auto* to = result.mutable_data_ptr<double>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    auto* terms = static_cast<Term*>(thread_scratch(size * int64_t(sizeof(Term))));
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < size; ++i) terms[i] = {cap[row * size + i], from[row * size + i]};
      to[row] = solve_level(terms, size, goal[row]);
    }
  });
  return result;
}

double finite(double value) { return std::isfinite(value) ? value : 0.0; }
double sign(double value) { return (value > 0) - (value < 0); }

// One row of `hyperplane_way`.
template <class T>
void find_way(T* way, const T* points, const T* normal, double gap, bool linf, double low,
              double high, int64_t size, Term* terms) {
  double largest = 0;
  for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::abs(finite(normal[i])));
  const double scale = largest > 0 ? largest : 1, reach = finite(gap) / scale;
  int64_t count = 0;
  // In linf all elements go t far, in l2 t times their size, or as far as there is room.
  const auto size_of = [&](int64_t i) { return std::abs(finite(normal[i])) / scale; };
  const auto sign_of = [&](int64_t i) { return sign(finite(normal[i])) * sign(reach); };
  const auto room_of = [&](int64_t i) {
    return std::max(sign_of(i) > 0 ? high - points[i] : points[i] - low, 0.0);
  };
  // The share of its size that an element has room for; finite, as its term may be 0 times it.
  const auto cap_of = [&](int64_t i) { return std::min(room_of(i) / size_of(i), kLargest); };
  for (int64_t i = 0; i < size; ++i) {
    const double s = size_of(i);
    if (s > 0) terms[count++] = linf ? Term{room_of(i), s} : Term{cap_of(i), s * s};
  }
  const double level = solve_level(terms, count, std::abs(reach));
  for (int64_t i = 0; i < size; ++i) {
    const double s = size_of(i), room = room_of(i);
    const double far = s > 0 && !linf && level < cap_of(i) ? level * s : room;
    way[i] = T(sign_of(i) * (linf ? std::min(room, level) : far));
  }
}

at::Tensor hyperplane_way(const at::Tensor& points, const at::Tensor& normal, const at::Tensor& gap,
                          bool linf, double low, double high) {
  check_shape(normal, "normal", points, "points");
  TORCH_CHECK_VALUE(points.dim() == 2 && gap.dim() == 1 && gap.size(0) == points.size(0),
                    "points must have axes [B, N] and gap [B], got ", points.sizes(), " and ",
                    gap.sizes());
  TORCH_CHECK_TYPE(normal.scalar_type() == points.scalar_type(), "normal must be ",
                   points.scalar_type(), " as points are, got ", normal.scalar_type());
  const at::Tensor p = points.contiguous(), n = normal.contiguous();
  const at::Tensor g = gap.to(at::kDouble).contiguous();
  const int64_t rows = p.size(0), size = p.size(1);
  at::Tensor result = at::empty(p.sizes(), p.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T *from = p.const_data_ptr<T>(), *towards = n.const_data_ptr<T>();
    T* to = result.mutable_data_ptr<T>();
    const double* far = g.const_data_ptr<double>();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      auto* terms = static_cast<Term*>(thread_scratch(size * int64_t(sizeof(Term))));
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * size;
        find_way(to + at, from + at, towards + at, far[row], linf, low, high, size, terms);
      }
    });
  };
  if (p.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    TORCH_CHECK_TYPE(p.scalar_type() == at::kDouble, "points must be float32 or float64, got ",
                     p.scalar_type());
    run(double{});
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("water_level", &water_level);
  m.impl("hyperplane_way", &hyperplane_way);
}

}  // namespace fastadv
