// Distance of attention maps on the CPU. Definition: fastadv/ops/attention_map_distance.py.
#include <cmath>

#include "cpu/feature_sums.h"
#include "cpu/stream.h"

namespace fastadv {
namespace {

constexpr int64_t kTile = 512;  // positions whose sums stay in the L1 cache
constexpr int64_t kRows = 4;    // channels added in the dtype of computation, then in double

// Features [B, C, ...] whose memory is [B, C, P], or [B, P, C] if pixels is true.
struct Planes {
  at::Tensor tensor;
  int64_t batch, channels, positions;
  bool pixels;

  int64_t sample_size() const { return channels * positions; }
};

Planes planes_of(const Features& features) {
  const at::Tensor& t = features.tensor;
  TORCH_CHECK_VALUE(t.dim() > 1, features.name, " must have a batch and a channel axis, got ",
                    t.sizes());
  TORCH_CHECK_VALUE(t.device().is_cpu(), features.name, " must be on the CPU, got ", t.device());
  const bool pixels = !t.is_contiguous() && t.movedim(1, -1).is_contiguous();
  int64_t positions = 1;
  for (int64_t axis = 2; axis < t.dim(); ++axis) positions *= t.size(axis);
  return {pixels ? t : t.contiguous(), t.size(0), t.size(1), positions, pixels};
}

// The sums over the channels of u^2 at `count` <= kTile positions that lie side by side.
template <class T>
FASTADV_INLINE void map_of_planes(Compute<T>* map, const T* u, int64_t channels, int64_t positions,
                                  int64_t count) {
  using C = Compute<T>;
  double total[kTile] = {};
  int64_t c = 0;
  for (; c + kRows <= channels; c += kRows) {
    const T* rows = u + c * positions;
    for (int64_t p = 0; p < count; ++p) {
      const C w = load(rows[p]), x = load(rows[positions + p]);
      const C y = load(rows[2 * positions + p]), z = load(rows[3 * positions + p]);
      total[p] += (w * w + x * x) + (y * y + z * z);
    }
  }
  for (; c < channels; ++c) {
    for (int64_t p = 0; p < count; ++p) {
      const C x = load(u[c * positions + p]);
      total[p] += x * x;
    }
  }
  for (int64_t p = 0; p < count; ++p) map[p] = C(total[p]);
}

// The same where the channels of a position lie side by side. Lanes are added up before they go to
// double, unlike in sums(): that is once per few hundred channels, of which there may be no more.
template <class T>
FASTADV_INLINE void map_of_pixels(Compute<T>* map, const T* u, int64_t channels, int64_t count) {
  using C = Compute<T>;
  const int64_t whole = channels / kLanes * kLanes;
  for (int64_t p = 0; p < count; ++p, u += channels) {
    double total = 0;
    for (int64_t begin = 0; begin < whole; begin += kRun) {
      C lane[kLanes] = {};
      for (int64_t c = begin; c < std::min(whole, begin + kRun); c += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
          const C x = load(u[c + l]);
          lane[l] += x * x;
        }
      }
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
      }
      total += lane[0];
    }
    for (int64_t c = whole; c < channels; ++c) {
      const C x = load(u[c]);
      total += x * x;
    }
    map[p] = C(total);
  }
}

// The attention maps [B, P].
template <class T>
void fill_maps(const at::Tensor& maps, const Planes& u) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, u.channels));
  const auto fill = [&](int64_t sample, int64_t begin, int64_t end) {
    Compute<T>* map = data<Compute<T>>(maps) + sample * u.positions;
    const T* from = data<T>(u.tensor) + sample * u.sample_size();
    if (u.pixels) {
      FASTADV_DISPATCH(
          map_of_pixels(map + begin, from + begin * u.channels, u.channels, end - begin));
      return;
    }
    for (int64_t p = begin; p < end; p += kTile) {
      FASTADV_DISPATCH(
          map_of_planes(map + p, from + p, u.channels, u.positions, std::min(kTile, end - p)));
    }
  };
  parallel_over_samples(u.batch, u.positions, fill, grain);
}

at::Tensor maps_of(const Planes& u) {
  const auto options = u.tensor.options().dtype(compute_dtype(u.tensor));
  at::Tensor maps = at::empty({u.batch, u.positions}, options.memory_format(std::nullopt));
  dispatch_float(u.tensor.scalar_type(), "features",
                 [&](auto t) { fill_maps<decltype(t)>(maps, u); });
  return maps;
}

// The divisor of a map: its norm, or 1 for a map of zeros. Dividing, unlike multiplying by the
// inverse, gives exactly 1 for a map of one position, and so the distance 0.
inline double divisor(double norm) { return norm == 0 ? 1 : norm; }

template <class C>
FASTADV_INLINE std::array<double, 2> map_squares(const C* a, const C* b, int64_t n) {
  return sums<double, 2>(n, [&](int64_t i) {
    const double x = a[i], y = b[i];
    return std::array<double, 2>{x * x, y * y};
  });
}

template <class C>
FASTADV_INLINE double map_distance(const C* a, const C* b, double norm_a, double norm_b,
                                   int64_t n) {
  const auto sum = sums<double, 1>(n, [&](int64_t i) {
    const double d = a[i] / norm_a - b[i] / norm_b;
    return std::array<double, 1>{d * d};
  });
  return std::sqrt(sum[0]);
}

template <class C>
void fill_distances(const at::Tensor& distance, const at::Tensor& norms, const at::Tensor& u_map,
                    const at::Tensor& v_map) {
  const int64_t positions = u_map.size(1);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, positions));
  at::parallel_for(0, u_map.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const C *a = data<C>(u_map) + i * positions, *b = data<C>(v_map) + i * positions;
      const auto squares = FASTADV_DISPATCH(map_squares(a, b, positions));
      const double norm_a = std::sqrt(squares[0]), norm_b = std::sqrt(squares[1]);
      data<C>(distance)[i] =
          C(FASTADV_DISPATCH(map_distance(a, b, divisor(norm_a), divisor(norm_b), positions)));
      data<C>(norms)[2 * i] = C(norm_a);
      data<C>(norms)[2 * i + 1] = C(norm_b);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_map_distance(
    const at::Tensor& u, const at::Tensor& v) {
  // If one of the two is float64, both are computed in float64; else each is read in its own dtype.
  const bool wide = u.scalar_type() == at::kDouble || v.scalar_type() == at::kDouble;
  const at::Tensor wide_u = wide ? u.to(at::kDouble) : u, wide_v = wide ? v.to(at::kDouble) : v;
  const Planes a = planes_of({"u", wide_u}), b = planes_of({"v", wide_v});
  TORCH_CHECK_VALUE(u.size(0) == v.size(0) && u.sizes().slice(2) == v.sizes().slice(2),
                    "v must have the batch and spatial sizes of u, ", u.sizes(), ", got ",
                    v.sizes());
  const at::Tensor u_map = maps_of(a), v_map = maps_of(b);
  at::Tensor distance = at::empty({a.batch}, u_map.options());
  at::Tensor norms = at::empty({a.batch, 2}, u_map.options());
  if (wide) {
    fill_distances<double>(distance, norms, u_map, v_map);
  } else {
    fill_distances<float>(distance, norms, u_map, v_map);
  }
  return {distance, u_map, v_map, norms};
}

// The gradient in u is slope(p) * u at each position p. For unit vectors A, B at distance d,
// (A (A.B) - B) / d = (A - B) / d - A d / 2, which does not cancel where A.B is almost 1.
template <class C>
FASTADV_INLINE void slopes(C* out, const C* a, const C* b, double norm_a, double norm_b,
                           double distance, double grad, int64_t n) {
  const bool nothing = distance == 0 || norm_a == 0 || norm_b == 0;
  const double weight = nothing ? 0 : 2 * grad / norm_a, d = nothing ? 1 : distance;
  const double divisor_a = divisor(norm_a), divisor_b = divisor(norm_b);
  for (int64_t p = 0; p < n; ++p) {
    const double x = a[p] / divisor_a, y = b[p] / divisor_b;
    out[p] = C(weight * ((x - y) / d - x * (d / 2)));
  }
}

// out = slope * u for `count` elements of [C, P] from one at `position` on.
template <class T>
FASTADV_INLINE void scale_planes(T* out, const T* u, const Compute<T>* slopes, int64_t position,
                                 int64_t positions, int64_t count) {
  for (int64_t i = 0; i < count; position = 0) {
    const int64_t n = std::min(positions - position, count - i);
    for (int64_t p = 0; p < n; ++p) store(out[i + p], slopes[position + p] * load(u[i + p]));
    i += n;
  }
}

// The same in [P, C], from one of `channel` on; the first slope is that element's.
template <class T>
FASTADV_INLINE void scale_pixels(T* out, const T* u, const Compute<T>* slopes, int64_t channel,
                                 int64_t channels, int64_t count) {
  for (int64_t i = 0; i < count; channel = 0) {
    const int64_t n = std::min(channels - channel, count - i);
    const Compute<T> slope = *slopes++;
    for (int64_t c = 0; c < n; ++c) store(out[i + c], slope * load(u[i + c]));
    i += n;
  }
}

// The slopes of all positions [B, P].
template <class C>
void fill_slopes(const at::Tensor& out, const at::Tensor& grad, const at::Tensor& a,
                 const at::Tensor& b, const at::Tensor& norms, const at::Tensor& distance) {
  const int64_t positions = out.size(1);
  parallel_over_samples(out.size(0), positions, [&](int64_t sample, int64_t begin, int64_t end) {
    const int64_t at = sample * positions + begin;
    const C* norm = data<C>(norms) + 2 * sample;
    const C of_sample = data<C>(distance)[sample], slope = data<C>(grad)[sample];
    FASTADV_DISPATCH(slopes(data<C>(out) + at, data<C>(a) + at, data<C>(b) + at, norm[0], norm[1],
                            of_sample, slope, end - begin));
  });
}

template <class T>
void fill_gradient(const at::Tensor& out, const Planes& u, const at::Tensor& slopes) {
  const bool streamed = int64_t(out.nbytes()) >= kStreamedBytes;
  const int64_t size = u.sample_size();
  parallel_over_samples(u.batch, size, [&](int64_t sample, int64_t begin, int64_t end) {
    const T* from = data<T>(u.tensor) + sample * size + begin;
    const Compute<T>* of_sample = data<Compute<T>>(slopes) + sample * u.positions;
    write_blocks<1>(
        std::array{data<T>(out) + sample * size + begin}, end - begin, streamed,
        [&](const auto& to, int64_t first, int64_t n) {
          const int64_t at = begin + first;
          if (u.pixels) {
            FASTADV_DISPATCH(scale_pixels(to[0], from + first, of_sample + at / u.channels,
                                          at % u.channels, u.channels, n));
          } else {
            FASTADV_DISPATCH(
                scale_planes(to[0], from + first, of_sample, at % u.positions, u.positions, n));
          }
        });
  });
}

at::Tensor attention_map_distance_backward(const at::Tensor& grad, const at::Tensor& u,
                                           const at::Tensor& u_map, const at::Tensor& v_map,
                                           const at::Tensor& norms, const at::Tensor& distance) {
  const Planes a = planes_of({"u", u});
  const auto own = compute_dtype(u);
  const auto dtype = compute_dtype(u_map);
  const auto per_map = [&](const at::Tensor& t, const char* name) {
    return per_sample_values(t, name, {a.batch, a.positions}, dtype);
  };
  at::Tensor slopes = at::empty({a.batch, a.positions}, u_map.options().dtype(dtype));
  dispatch_float(dtype, "u_map", [&](auto t) {
    fill_slopes<Compute<decltype(t)>>(slopes, per_sample_values(grad, "grad", {a.batch}, dtype),
                                      per_map(u_map, "u_map"), per_map(v_map, "v_map"),
                                      per_sample_values(norms, "norms", {a.batch, 2}, dtype),
                                      per_sample_values(distance, "distance", {a.batch}, dtype));
  });
  const Gradient gradient = gradient_for(u, a.tensor);
  dispatch_float(u.scalar_type(), "u",
                 [&](auto t) { fill_gradient<decltype(t)>(gradient.computed, a, slopes.to(own)); });
  return gradient.finished();
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("attention_map_distance", &attention_map_distance);
  m.impl("attention_map_distance_backward", &attention_map_distance_backward);
}

}  // namespace fastadv
