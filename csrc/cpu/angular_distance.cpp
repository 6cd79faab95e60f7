// Angular distance and the replay switch on the CPU. Definition: fastadv/ops/angular_distance.py.
#include <cmath>
#include <limits>

#include "cpu/feature_sums.h"
#include "cpu/stream.h"

namespace fastadv {
namespace {

using Moments = std::array<double, 3>;  // u.v, u.u, v.v

template <class T>
FASTADV_INLINE Moments moments_of(const T* u, const T* v, int64_t n) {
  using C = Compute<T>;
  return sums<C, 3>(n, [&](int64_t i) {
    const C a = load(u[i]), b = load(v[i]);
    return std::array<C, 3>{a * b, a * a, b * b};
  });
}

// [B, 3]: u.v, u.u, v.v of each sample.
template <class T>
void fill_moments(const at::Tensor& u, const at::Tensor& v, const at::Tensor& moments) {
  const T *a = data<T>(u), *b = data<T>(v);
  const auto sums = sums_of_samples<3>(u.size(0), sample_size(u), [&](int64_t at, int64_t count) {
    return FASTADV_DISPATCH(moments_of(a + at, b + at, count));
  });
  Compute<T>* out = data<Compute<T>>(moments);
  for (const Moments& of_sample : sums) {
    for (const double moment : of_sample) *out++ = Compute<T>(moment);
  }
}

// The product of the two norms; NaN where squares have overflowed, as nothing can be said then.
template <class C>
C length_of(const C* moments) {
  const C length = std::sqrt(moments[1]) * std::sqrt(moments[2]);
  return std::isinf(length) ? std::numeric_limits<C>::quiet_NaN() : length;
}

template <class C>
void fill_distance(const at::Tensor& moments, const at::Tensor& distance) {
  const C* m = data<C>(moments);
  C* d = data<C>(distance);
  for (int64_t i = 0; i < distance.numel(); ++i) {
    const C length = length_of(m + 3 * i);
    const C distance = length == 0 ? C(1) : 1 - std::abs(m[3 * i]) / length;
    d[i] = distance < 0 ? C(0) : distance;  // rounding can carry it below; a NaN stays
  }
}

std::tuple<at::Tensor, at::Tensor> angular_distance(const at::Tensor& u, const at::Tensor& v) {
  const auto pair = aligned({{"u", u}, {"v", v}});
  at::Tensor distance =
      at::empty({u.size(0)}, u.options().dtype(compute_dtype(pair[0])).memory_format(std::nullopt));
  at::Tensor moments = at::empty({u.size(0), 3}, distance.options());
  dispatch_float(pair[0].scalar_type(), "u", [&](auto t) {
    using T = decltype(t);
    fill_moments<T>(pair[0], pair[1], moments);
    fill_distance<Compute<T>>(moments, distance);
  });
  return {distance, moments};
}

std::tuple<at::Tensor, at::Tensor> replay_mask(const at::Tensor& u, const at::Tensor& v,
                                               double tau) {
  const at::Tensor distance = std::get<0>(angular_distance(u, v));
  return {distance, distance.gt(tau)};
}

// The gradient in u is along_u * u + across * v, that in v along_v * v + across * u.
template <class C>
struct Slopes {
  C along_u, along_v, across;

  Slopes(C grad, const C* moments) {
    const C dot = moments[0], length = length_of(moments);
    const C sign = dot > 0 ? C(1) : dot < 0 ? C(-1) : C(0);
    across = length == 0 ? C(0) : -grad * sign / length;
    along_u = length == 0 ? C(0) : -across * dot / moments[1];
    along_v = length == 0 ? C(0) : -across * dot / moments[2];
  }
};

template <class T>
FASTADV_INLINE void combine(T* out, const T* own, const T* other, Compute<T> along,
                            Compute<T> across, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(out[i], along * load(own[i]) + across * load(other[i]));
}

template <class T>
FASTADV_INLINE void combine_both(T* out_u, T* out_v, const T* u, const T* v, Slopes<Compute<T>> s,
                                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Compute<T> a = load(u[i]), b = load(v[i]);
    store(out_u[i], s.along_u * a + s.across * b);
    store(out_v[i], s.along_v * b + s.across * a);
  }
}

// Both gradients in one pass; slopes(sample) are the Slopes of a sample.
template <class T, class F>
void fill_both(const at::Tensor& of_u, const at::Tensor& of_v, const at::Tensor& u,
               const at::Tensor& v, const F& slopes) {
  const int64_t size = sample_size(u);
  const bool streamed = int64_t(2 * of_u.nbytes()) >= kStreamedBytes;
  parallel_over_samples(u.size(0), size, [&](int64_t sample, int64_t begin, int64_t end) {
    const int64_t at = sample * size + begin;
    const T *a = data<T>(u) + at, *b = data<T>(v) + at;
    write_blocks<2>(std::array{data<T>(of_u) + at, data<T>(of_v) + at}, end - begin, streamed,
                    [&, s = slopes(sample)](const auto& to, int64_t first, int64_t n) {
                      FASTADV_DISPATCH(combine_both(to[0], to[1], a + first, b + first, s, n));
                    });
  });
}

// The gradient in `own`, one of the two feature tensors; `along` is its factor.
template <class T, class F, class C>
void fill_one(const at::Tensor& out, const at::Tensor& own, const at::Tensor& other,
              const F& slopes, C Slopes<C>::* along) {
  const int64_t size = sample_size(own);
  const bool streamed = int64_t(out.nbytes()) >= kStreamedBytes;
  parallel_over_samples(own.size(0), size, [&](int64_t sample, int64_t begin, int64_t end) {
    const int64_t at = sample * size + begin;
    const T *a = data<T>(own) + at, *b = data<T>(other) + at;
    write_blocks<1>(std::array{data<T>(out) + at}, end - begin, streamed,
                    [&, s = slopes(sample)](const auto& to, int64_t first, int64_t n) {
                      FASTADV_DISPATCH(combine(to[0], a + first, b + first, s.*along, s.across, n));
                    });
  });
}

std::tuple<at::Tensor, at::Tensor> angular_distance_backward(const at::Tensor& grad,
                                                             const at::Tensor& u,
                                                             const at::Tensor& v,
                                                             const at::Tensor& moments, bool want_u,
                                                             bool want_v) {
  const auto pair = aligned({{"u", u}, {"v", v}});
  const auto dtype = compute_dtype(pair[0]);
  const at::Tensor grads = per_sample_values(grad, "grad", {u.size(0)}, dtype);
  const at::Tensor sums = per_sample_values(moments, "moments", {u.size(0), 3}, dtype);
  const Gradient of_u = want_u ? gradient_for(u, pair[0]) : no_gradient(u);
  const Gradient of_v = want_v ? gradient_for(v, pair[0]) : no_gradient(v);
  dispatch_float(pair[0].scalar_type(), "u", [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    const auto slopes = [&](int64_t sample) {
      return Slopes<C>(data<C>(grads)[sample], data<C>(sums) + 3 * sample);
    };
    if (want_u && want_v) {
      fill_both<T>(of_u.computed, of_v.computed, pair[0], pair[1], slopes);
    } else if (want_u) {
      fill_one<T>(of_u.computed, pair[0], pair[1], slopes, &Slopes<C>::along_u);
    } else if (want_v) {
      fill_one<T>(of_v.computed, pair[1], pair[0], slopes, &Slopes<C>::along_v);
    }
  });
  return {of_u.finished(), of_v.finished()};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("angular_distance", &angular_distance);
  m.impl("angular_distance_backward", &angular_distance_backward);
  m.impl("replay_mask", &replay_mask);
}

}  // namespace fastadv
