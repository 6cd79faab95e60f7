// The inner loops of csrc/cpu/rows_float.h at all SIMD levels.
#include "cpu/rows_float.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/activations_float.h"

namespace fastadv::rows {
namespace {

// Pixels whose products are added up before the sum goes to the sum of all: the error of a sum
// grows with the number of its terms.
constexpr int64_t kSummedPixels = 64;
constexpr int64_t kChannels = 1024;  // whose sums are kept in a thread's stack

template <Activation kind>
struct Forward {
  template <class V>
  static FASTADV_INLINE V of(V, V x) {
    return value_of<kind>(x);
  }
};

template <Activation kind>
struct Backward {
  template <class V>
  static FASTADV_INLINE V of(V g, V x) {
    return gradient_of<kind>(g, x);
  }
};

// out = F(gradient, x); forward `gradient` is x again.
template <class F, class V>
FASTADV_INLINE void run_vectors(float* out, const float* gradient, const float* x, int64_t count) {
  constexpr int kStep = kLanesOf<V>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    set_lanes<V>(out + i, F::of(lanes_at<V>(gradient + i), lanes_at<V>(x + i)));
  }
  if (i == count) return;
  // The last vector is made whole, so that an element's result does not depend on its place.
  float rest[2][kStep] = {};
  std::copy(gradient + i, gradient + count, rest[0]);
  std::copy(x + i, x + count, rest[1]);
  set_lanes<V>(rest[0], F::of(lanes_at<V>(rest[0]), lanes_at<V>(rest[1])));
  std::copy(rest[0], rest[0] + (count - i), out + i);
}

template <class F>
FASTADV_AVX512_ONLY void run_wide(float* out, const float* gradient, const float* x,
                                  int64_t count) {
  run_vectors<F, Vector<float, 64>>(out, gradient, x, count);
}

template <class F>
void run(float* out, const float* gradient, const float* x, int64_t count) {
  if (has_avx512()) return run_wide<F>(out, gradient, x, count);
  below_avx512([&]() __attribute__((always_inline)) {
    run_vectors<F, Vector<float, 32>>(out, gradient, x, count);
  });
}

using Run = void (*)(float*, const float*, const float*, int64_t);

template <template <Activation> class F>
constexpr Run kRuns[] = {run<F<Activation::kGelu>>,        run<F<Activation::kGeluTanh>>,
                         run<F<Activation::kSilu>>,        run<F<Activation::kHardswish>>,
                         run<F<Activation::kHardsigmoid>>, run<F<Activation::kSigmoid>>,
                         run<F<Activation::kRelu6>>};

template <class V>
FASTADV_INLINE float sum_of_lanes(V v) {
  float sum = 0;
  for (int l = 0; l < kLanesOf<V>; ++l) sum += v[l];
  return sum;
}

// The sums over c of the terms of a row, one for each place of the array that of(c, V) returns;
// of(c, float) is for the elements that fill no vector.
template <class V, int kSums, class F>
FASTADV_INLINE std::array<float, kSums> row_sums(int64_t channels, const F& of) {
  V part[kSums] = {};
  std::array<float, kSums> sums;
  int64_t c = 0;
  for (; c + kLanesOf<V> <= channels; c += kLanesOf<V>) {
    const auto terms = of(c, V{});
    for (int k = 0; k < kSums; ++k) part[k] += terms[k];
  }
  for (int k = 0; k < kSums; ++k) sums[k] = sum_of_lanes(part[k]);
  for (; c < channels; ++c) {
    const auto terms = of(c, float{});
    for (int k = 0; k < kSums; ++k) sums[k] += terms[k];
  }
  return sums;
}

// The element of a row, or the vector of them, that `like` stands for.
FASTADV_INLINE float at(const float* row, int64_t c, float) { return row[c]; }
template <class V>
FASTADV_INLINE V at(const float* row, int64_t c, V) {
  return lanes_at<V>(row + c);
}

template <class V>
FASTADV_INLINE void norm_rows(float* __restrict out, float* statistics, const float* x,
                              const Norm& norm, int64_t count) {
  const int64_t channels = norm.channels;
  for (int64_t row = 0; row < count; ++row, x += channels, out += channels) {
    const auto value = [&](int64_t c, auto like)
                           __attribute__((always_inline)) { return std::array{at(x, c, like)}; };
    const float mean = row_sums<V, 1>(channels, value)[0] / float(channels);
    const auto square = [&](int64_t c, auto like) __attribute__((always_inline)) {
      const auto off = at(x, c, like) - mean;
      return std::array{off * off};
    };
    const float squares = row_sums<V, 1>(channels, square)[0];
    const float scale = 1.f / std::sqrt(squares / float(channels) + norm.eps);
    statistics[2 * row] = mean;
    statistics[2 * row + 1] = scale;
    for (int64_t c = 0; c < channels; ++c) {
      const float wide = (x[c] - mean) * scale * (norm.weight ? norm.weight[c] : 1.f);
      out[c] = wide + (norm.bias ? norm.bias[c] : 0.f);
    }
  }
}

template <class V>
FASTADV_INLINE void norm_rows_backward(float* __restrict out, const float* gradient, const float* x,
                                       const float* statistics, const float* add, const Norm& norm,
                                       int64_t count) {
  const int64_t channels = norm.channels;
  for (int64_t row = 0; row < count; ++row) {
    const float mean = statistics[2 * row], scale = statistics[2 * row + 1];
    const auto terms = [&](int64_t c, auto like) __attribute__((always_inline)) {
      auto g = at(gradient, c, like);
      if (norm.weight) g *= at(norm.weight, c, like);
      const auto off = at(x, c, like) - mean;
      return std::array{g, g * off};
    };
    const auto sums = row_sums<V, 2>(channels, terms);
    const float inverse = 1.f / float(channels);
    const float shift = sums[0] * inverse, slope = sums[1] * inverse * scale * scale;
    for (int64_t c = 0; c < channels; ++c) {
      const float g = gradient[c] * (norm.weight ? norm.weight[c] : 1.f);
      const float value = scale * (g - shift - (x[c] - mean) * slope);
      out[c] = value + (add ? add[c] : 0.f);
    }
    gradient += channels;
    x += channels;
    out += channels;
    if (add) add += channels;
  }
}

FASTADV_AVX512_ONLY void norm_rows_wide(float* out, float* statistics, const float* x,
                                        const Norm& norm, int64_t count) {
  norm_rows<Vector<float, 64>>(out, statistics, x, norm, count);
}

FASTADV_AVX512_ONLY void norm_rows_backward_wide(float* out, const float* gradient, const float* x,
                                                 const float* statistics, const float* add,
                                                 const Norm& norm, int64_t count) {
  norm_rows_backward<Vector<float, 64>>(out, gradient, x, statistics, add, norm, count);
}

FASTADV_INLINE void gate_rows(float* __restrict out, const float* x, const float* gate,
                              int64_t pixels, int64_t channels) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, out += channels) {
    for (int64_t c = 0; c < channels; ++c) out[c] = x[c] * gate[c];
  }
}

// For the channels [first, first + count), at most kChannels.
FASTADV_INLINE void gate_backward_part(float* __restrict out, float* __restrict sums,
                                       const float* gradient, const float* x, const float* gate,
                                       int64_t pixels, int64_t channels, int64_t first,
                                       int64_t count) {
  alignas(64) float part[kChannels];
  for (int64_t begin = 0; begin < pixels; begin += kSummedPixels) {
    const int64_t end = std::min(pixels, begin + kSummedPixels);
    for (int64_t c = 0; c < count; ++c) part[c] = 0;
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int64_t at = pixel * channels + first;
      const float *g = gradient + at, *from = x + at, *by = gate + first;
      float* __restrict to = out + at;
      for (int64_t c = 0; c < count; ++c) {
        part[c] += g[c] * from[c];
        to[c] = g[c] * by[c];
      }
    }
    for (int64_t c = 0; c < count; ++c) sums[first + c] += part[c];
  }
}

FASTADV_INLINE void gate_backward_rows(float* out, float* sums, const float* gradient,
                                       const float* x, const float* gate, int64_t pixels,
                                       int64_t channels) {
  std::fill(sums, sums + channels, 0.f);
  for (int64_t first = 0; first < channels; first += kChannels) {
    gate_backward_part(out, sums, gradient, x, gate, pixels, channels, first,
                       std::min(kChannels, channels - first));
  }
}

template <bool relu>
FASTADV_INLINE void affine_rows(float* __restrict out, const float* x, int64_t stride,
                                const float* scale, const float* shift, int64_t count,
                                int64_t channels) {
  for (int64_t row = 0; row < count; ++row, x += stride, out += channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const float value = x[c] * scale[c] + shift[c];
      out[c] = relu && value < 0 ? 0 : value;  // NaN stays
    }
  }
}

template <bool add>
FASTADV_INLINE void scale_rows(float* __restrict total, int64_t stride, const float* gradient,
                               const float* scale, int64_t count, int64_t channels) {
  for (int64_t row = 0; row < count; ++row, total += stride, gradient += channels) {
    for (int64_t c = 0; c < channels; ++c) {
      total[c] = gradient[c] * scale[c] + (add ? total[c] : 0.f);
    }
  }
}

}  // namespace

void activate(float* out, const float* x, int64_t count, Activation kind) {
  kRuns<Forward>[int64_t(kind)](out, x, x, count);
}

void activate_backward(float* out, const float* gradient, const float* x, int64_t count,
                       Activation kind) {
  kRuns<Backward>[int64_t(kind)](out, gradient, x, count);
}

void layer_norm(float* out, float* statistics, const float* x, const Norm& norm, int64_t count) {
  if (has_avx512()) return norm_rows_wide(out, statistics, x, norm, count);
  below_avx512([&]() __attribute__((always_inline)) {
    norm_rows<Vector<float, 32>>(out, statistics, x, norm, count);
  });
}

void layer_norm_backward(float* out, const float* gradient, const float* x, const float* statistics,
                         const float* add, const Norm& norm, int64_t count) {
  if (has_avx512()) {
    return norm_rows_backward_wide(out, gradient, x, statistics, add, norm, count);
  }
  below_avx512([&]() __attribute__((always_inline)) {
    norm_rows_backward<Vector<float, 32>>(out, gradient, x, statistics, add, norm, count);
  });
}

void gate(float* out, const float* x, const float* gate, int64_t pixels, int64_t channels) {
  FASTADV_DISPATCH(gate_rows(out, x, gate, pixels, channels));
}

void gate_backward(float* out, float* sums, const float* gradient, const float* x,
                   const float* gate, int64_t pixels, int64_t channels) {
  FASTADV_DISPATCH(gate_backward_rows(out, sums, gradient, x, gate, pixels, channels));
}

void strided_affine(float* out, const float* x, int64_t stride, const float* scale,
                    const float* shift, bool relu, int64_t count, int64_t channels) {
  if (relu) {
    FASTADV_DISPATCH(affine_rows<true>(out, x, stride, scale, shift, count, channels));
  } else {
    FASTADV_DISPATCH(affine_rows<false>(out, x, stride, scale, shift, count, channels));
  }
}

void strided_scale(float* total, int64_t stride, const float* gradient, const float* scale,
                   bool add, int64_t count, int64_t channels) {
  if (add) {
    FASTADV_DISPATCH(scale_rows<true>(total, stride, gradient, scale, count, channels));
  } else {
    FASTADV_DISPATCH(scale_rows<false>(total, stride, gradient, scale, count, channels));
  }
}

}  // namespace fastadv::rows
