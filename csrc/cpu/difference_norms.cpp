// Norms of differences from one common batch of features, on the CPU: the Euclidean distance (one
// difference) and VFD's two. Definitions: fastadv/ops/euclidean_distance.py and
// fastadv/ops/vanilla_feature_distillation.py.
#include <cmath>

#include "cpu/feature_sums.h"
#include "cpu/stream.h"

namespace fastadv {
namespace {

// |u - v|^2
template <class T>
FASTADV_INLINE std::array<double, 1> square_sum(const T* u, const T* v, int64_t n) {
  using C = Compute<T>;
  return sums<C, 1>(n, [&](int64_t i) {
    const C d = load(u[i]) - load(v[i]);
    return std::array<C, 1>{d * d};
  });
}

// |u - v|^2 and |w - v|^2
template <class T>
FASTADV_INLINE std::array<double, 2> square_sums(const T* u, const T* w, const T* v, int64_t n) {
  using C = Compute<T>;
  return sums<C, 2>(n, [&](int64_t i) {
    const C center = load(v[i]), a = load(u[i]) - center, b = load(w[i]) - center;
    return std::array<C, 2>{a * a, b * b};
  });
}

// slope * (u - v)
template <class T>
FASTADV_INLINE void difference(T* out, const T* u, const T* v, Compute<T> slope, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(out[i], slope * (load(u[i]) - load(v[i])));
}

// slope * (u - v) and its negative
template <class T>
FASTADV_INLINE void opposite_differences(T* out_u, T* out_v, const T* u, const T* v,
                                         Compute<T> slope, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Compute<T> gradient = slope * (load(u[i]) - load(v[i]));
    store(out_u[i], gradient);
    store(out_v[i], -gradient);
  }
}

// slope_u * (u - v) and slope_w * (w - v)
template <class T>
FASTADV_INLINE void two_differences(T* out_u, T* out_w, const T* u, const T* w, const T* v,
                                    Compute<T> slope_u, Compute<T> slope_w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Compute<T> center = load(v[i]);
    store(out_u[i], slope_u * (load(u[i]) - center));
    store(out_w[i], slope_w * (load(w[i]) - center));
  }
}

// The gradient of |d| in d is slope * d; 0 at 0.
template <class C>
C norm_slope(C grad, C norm) {
  return norm == 0 ? C(0) : grad / norm;
}

// Runs f(sample, at, count) over the samples' elements in parallel, `at` counting over the batch.
template <class F>
void over_elements(const at::Tensor& features, const F& f) {
  const int64_t size = sample_size(features);
  parallel_over_samples(features.size(0), size, [&](int64_t sample, int64_t begin, int64_t end) {
    f(sample, sample * size + begin, end - begin);
  });
}

// out = slope(sample) * (u - v)
template <class T, class F>
void fill_difference(const at::Tensor& out, const at::Tensor& u, const at::Tensor& v,
                     const F& slope) {
  const bool streamed = int64_t(out.nbytes()) >= kStreamedBytes;
  over_elements(u, [&](int64_t sample, int64_t at, int64_t count) {
    const T *a = data<T>(u) + at, *b = data<T>(v) + at;
    write_blocks<1>(std::array{data<T>(out) + at}, count, streamed,
                    [&, s = slope(sample)](const auto& to, int64_t first, int64_t n) {
                      FASTADV_DISPATCH(difference(to[0], a + first, b + first, s, n));
                    });
  });
}

at::Tensor per_sample_result(const at::Tensor& features, at::IntArrayRef shape) {
  return at::empty(shape,
                   features.options().dtype(compute_dtype(features)).memory_format(std::nullopt));
}

at::Tensor euclidean_distance(const at::Tensor& u, const at::Tensor& v, bool squared) {
  const auto pair = aligned({{"u", u}, {"v", v}});
  at::Tensor distance = per_sample_result(pair[0], {u.size(0)});
  dispatch_float(pair[0].scalar_type(), "u", [&](auto t) {
    using T = decltype(t);
    const T *a = data<T>(pair[0]), *b = data<T>(pair[1]);
    const auto sums = sums_of_samples<1>(u.size(0), sample_size(u), [&](int64_t at, int64_t count) {
      return FASTADV_DISPATCH(square_sum(a + at, b + at, count));
    });
    Compute<T>* out = data<Compute<T>>(distance);
    for (const auto& sum : sums) *out++ = Compute<T>(squared ? sum[0] : std::sqrt(sum[0]));
  });
  return distance;
}

// Both gradients in one pass.
template <class T, class F>
void fill_opposite(const at::Tensor& out_u, const at::Tensor& out_v, const at::Tensor& u,
                   const at::Tensor& v, const F& slope) {
  const bool streamed = int64_t(2 * out_u.nbytes()) >= kStreamedBytes;
  over_elements(u, [&](int64_t sample, int64_t at, int64_t count) {
    const T *a = data<T>(u) + at, *b = data<T>(v) + at;
    write_blocks<2>(
        std::array{data<T>(out_u) + at, data<T>(out_v) + at}, count, streamed,
        [&, s = slope(sample)](const auto& to, int64_t first, int64_t n) {
          FASTADV_DISPATCH(opposite_differences(to[0], to[1], a + first, b + first, s, n));
        });
  });
}

std::tuple<at::Tensor, at::Tensor> euclidean_distance_backward(
    const at::Tensor& grad, const at::Tensor& u, const at::Tensor& v, const at::Tensor& distance,
    bool squared, bool want_u, bool want_v) {
  const auto pair = aligned({{"u", u}, {"v", v}});
  const auto dtype = compute_dtype(pair[0]);
  const at::Tensor grads = per_sample_values(grad, "grad", {u.size(0)}, dtype);
  const at::Tensor norms = per_sample_values(distance, "distance", {u.size(0)}, dtype);
  const Gradient of_u = want_u ? gradient_for(u, pair[0]) : no_gradient(u);
  const Gradient of_v = want_v ? gradient_for(v, pair[0]) : no_gradient(v);
  dispatch_float(pair[0].scalar_type(), "u", [&](auto t) {
    using T = decltype(t);
    using C = Compute<T>;
    const C *g = data<C>(grads), *norm = data<C>(norms);
    const auto slope = [&](int64_t sample) {
      return squared ? 2 * g[sample] : norm_slope(g[sample], norm[sample]);
    };
    if (want_u && want_v) {
      fill_opposite<T>(of_u.computed, of_v.computed, pair[0], pair[1], slope);
    } else if (want_u) {
      fill_difference<T>(of_u.computed, pair[0], pair[1], slope);
    } else if (want_v) {
      fill_difference<T>(of_v.computed, pair[1], pair[0], slope);
    }
  });
  return {of_u.finished(), of_v.finished()};
}

std::tuple<at::Tensor, at::Tensor> vanilla_feature_distillation(const at::Tensor& f_adv,
                                                                const at::Tensor& f_clean,
                                                                const at::Tensor& f_vanilla) {
  const auto features = aligned({{"f_adv", f_adv}, {"f_clean", f_clean}, {"f_vanilla", f_vanilla}});
  at::Tensor loss = per_sample_result(features[0], {f_adv.size(0)});
  at::Tensor norms = at::empty({f_adv.size(0), 2}, loss.options());
  dispatch_float(features[0].scalar_type(), "f_adv", [&](auto t) {
    using T = decltype(t);
    const T *a = data<T>(features[0]), *b = data<T>(features[1]), *c = data<T>(features[2]);
    const auto sums =
        sums_of_samples<2>(f_adv.size(0), sample_size(f_adv), [&](int64_t at, int64_t count) {
          return FASTADV_DISPATCH(square_sums(a + at, b + at, c + at, count));
        });
    Compute<T>*to = data<Compute<T>>(loss), *norm = data<Compute<T>>(norms);
    for (const auto& sum : sums) {
      const double of_adv = std::sqrt(sum[0]), of_clean = std::sqrt(sum[1]);
      *to++ = Compute<T>(of_adv + of_clean);
      *norm++ = Compute<T>(of_adv);
      *norm++ = Compute<T>(of_clean);
    }
  });
  return {loss, norms};
}

// Both gradients in one pass; features are f_adv, f_clean and f_vanilla.
template <class T, class F>
void fill_two(const at::Tensor& out_adv, const at::Tensor& out_clean,
              const std::array<at::Tensor, 3>& features, const F& slope) {
  const bool streamed = int64_t(2 * out_adv.nbytes()) >= kStreamedBytes;
  over_elements(out_adv, [&](int64_t sample, int64_t at, int64_t count) {
    const T *a = data<T>(features[0]) + at, *b = data<T>(features[1]) + at;
    const T* c = data<T>(features[2]) + at;
    const auto of_adv = slope(sample, 0), of_clean = slope(sample, 1);
    write_blocks<2>(std::array{data<T>(out_adv) + at, data<T>(out_clean) + at}, count, streamed,
                    [&](const auto& to, int64_t first, int64_t n) {
                      FASTADV_DISPATCH(two_differences(to[0], to[1], a + first, b + first,
                                                       c + first, of_adv, of_clean, n));
                    });
  });
}

// The gradient in f_adv (which = 0) or f_clean (which = 1) alone; the other is not read.
at::Tensor one_gradient(const at::Tensor& grads, const at::Tensor& norms, const at::Tensor& f,
                        const char* name, const at::Tensor& f_vanilla, int which) {
  const auto pair = aligned({{name, f}, {"f_vanilla", f_vanilla}});
  const Gradient gradient = gradient_for(f, pair[0]);
  dispatch_float(pair[0].scalar_type(), name, [&](auto t) {
    using T = decltype(t);
    const double *g = data<double>(grads), *norm = data<double>(norms) + which;
    fill_difference<T>(gradient.computed, pair[0], pair[1], [&](int64_t sample) {
      return Compute<T>(norm_slope(g[sample], norm[2 * sample]));
    });
  });
  return gradient.finished();
}

std::tuple<at::Tensor, at::Tensor> vanilla_feature_distillation_backward(
    const at::Tensor& grad, const at::Tensor& f_adv, const at::Tensor& f_clean,
    const at::Tensor& f_vanilla, const at::Tensor& norms, bool want_adv, bool want_clean) {
  check_batched({"f_adv", f_adv});
  const at::Tensor g = per_sample_values(grad, "grad", {f_adv.size(0)}, at::kDouble);
  const at::Tensor n = per_sample_values(norms, "norms", {f_adv.size(0), 2}, at::kDouble);
  if (!(want_adv && want_clean)) {
    return {want_adv ? one_gradient(g, n, f_adv, "f_adv", f_vanilla, 0) : no_gradient(f_adv).result,
            want_clean ? one_gradient(g, n, f_clean, "f_clean", f_vanilla, 1)
                       : no_gradient(f_clean).result};
  }
  const auto features = aligned({{"f_adv", f_adv}, {"f_clean", f_clean}, {"f_vanilla", f_vanilla}});
  const Gradient of_adv = gradient_for(f_adv, features[0]);
  const Gradient of_clean = gradient_for(f_clean, features[0]);
  dispatch_float(features[0].scalar_type(), "f_adv", [&](auto t) {
    using T = decltype(t);
    fill_two<T>(of_adv.computed, of_clean.computed, features, [&](int64_t sample, int which) {
      return Compute<T>(norm_slope(data<double>(g)[sample], data<double>(n)[2 * sample + which]));
    });
  });
  return {of_adv.finished(), of_clean.finished()};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("euclidean_distance", &euclidean_distance);
  m.impl("euclidean_distance_backward", &euclidean_distance_backward);
  m.impl("vanilla_feature_distillation", &vanilla_feature_distillation);
  m.impl("vanilla_feature_distillation_backward", &vanilla_feature_distillation_backward);
}

}  // namespace fastadv
