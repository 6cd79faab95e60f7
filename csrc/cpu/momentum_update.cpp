// The accumulated gradient of momentum attacks on the CPU. Definition:
// fastadv/ops/momentum_update.py.
#include <cmath>

#include "cpu/active.h"
#include "cpu/sum.h"
#include "cpu/tensor.h"

namespace fastadv {
namespace {

template <class G>
FASTADV_INLINE double l1_norm(const G* grad, int64_t n) {
  return double_sums<1>(n, [&](int64_t i) __attribute__((always_inline)) {
    return std::array<double, 1>{std::abs(double(load(grad[i])))};
  })[0];
}

// The factor of the gradient; 0 if the gradient adds nothing.
template <class C>
double factor_of(double norm) {
  const double factor = 1 / norm;
  if (!(norm > 0 && std::isfinite(norm) && std::isfinite(factor))) return 0;
  return std::is_same_v<C, float> ? rounded_to_float_precision(factor) : factor;
}

template <class C, class G>
FASTADV_INLINE void update(C* momentum, const G* grad, C decay, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const C added = factor == 0 ? C(0) : C(double(load(grad[i])) * factor);
    momentum[i] = decay * momentum[i] + added;
  }
}

template <class C, class G>
void run(const at::Tensor& momentum, const at::Tensor& grad, double decay, const Active& active) {
  const int64_t size = sample_size(momentum);
  if (size == 0) return;
  C* m = data<C>(momentum);
  const G* g = data<G>(grad);
  const int64_t grain = std::max<int64_t>(1, kGrain / size);
  at::parallel_for(0, momentum.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!active[i]) continue;
      const double factor = factor_of<C>(FASTADV_DISPATCH(l1_norm(g + i * size, size)));
      FASTADV_DISPATCH(update(m + i * size, g + i * size, C(decay), factor, size));
    }
  });
}

void momentum_update_(at::Tensor momentum, const at::Tensor& grad, double decay,
                      const OptionalTensor& active) {
  check_momentum(momentum, grad);
  const Active chosen(active, momentum);
  const at::Tensor at_hand = batch_major(momentum);
  const at::Tensor g = apart_from(at_hand, in_layout_of(grad, at_hand));
  dispatch_float(g.scalar_type(), "grad", [&](auto t) {
    const auto update =
        momentum.scalar_type() == at::kFloat ? run<float, decltype(t)> : run<double, decltype(t)>;
    update(at_hand, g, decay, chosen);
  });
  if (!at_hand.is_same(momentum)) momentum.copy_(at_hand);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("momentum_update_", &momentum_update_); }

}  // namespace fastadv
