// The inner loops of csrc/cpu/rows.h, apart from torch's headers as those of conv3x3_avx512.cpp
// are.
#include "cpu/rows.h"

#if defined(__x86_64__) && defined(__linux__)
#include <algorithm>

#include "cpu/activations_avx512.h"
#include "cpu/conv_inner.h"

namespace fastadv::rows {
namespace {

using conv::kVector;
using conv::lanes;
using conv::load_bf16;

FASTADV_AVX512_INLINE void put(uint16_t* to, __m512 value, __mmask16 live) {
  if (live == 0xffff) {
    conv::store_bf16(to, value);
  } else {
    _mm256_mask_storeu_epi16(to, live, (__m256i)_mm512_cvtneps_pbh(value));
  }
}

template <Activation kind>
FASTADV_AVX512 void forward_run(uint16_t* out, const uint16_t*, const uint16_t* x, int64_t count) {
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) {
    conv::store_bf16(out + i, value_of<kind>(load_bf16(x + i)));
  }
  if (i < count) put(out + i, value_of<kind>(load_bf16(x + i, lanes(count - i))), lanes(count - i));
}

template <Activation kind>
FASTADV_AVX512 void backward_run(uint16_t* out, const uint16_t* gradient, const uint16_t* x,
                                 int64_t count) {
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) {
    const __m512 slope = slope_of<kind>(load_bf16(x + i));
    conv::store_bf16(out + i, _mm512_mul_ps(load_bf16(gradient + i), slope));
  }
  if (i < count) {
    const __mmask16 live = lanes(count - i);
    const __m512 slope = slope_of<kind>(load_bf16(x + i, live));
    put(out + i, _mm512_mul_ps(load_bf16(gradient + i, live), slope), live);
  }
}

using Run = void (*)(uint16_t*, const uint16_t*, const uint16_t*, int64_t);

#define FASTADV_ALL_KINDS(run)                                                            \
  {run<Activation::kGelu>,      run<Activation::kGeluTanh>,    run<Activation::kSilu>,    \
   run<Activation::kHardswish>, run<Activation::kHardsigmoid>, run<Activation::kSigmoid>, \
   run<Activation::kRelu6>}

constexpr Run kForward[] = FASTADV_ALL_KINDS(forward_run);
constexpr Run kBackward[] = FASTADV_ALL_KINDS(backward_run);

// The lanes of a second vector that hold what the first one of 16 leaves.
FASTADV_AVX512_INLINE __mmask16 rest(int64_t count) {
  return count <= kVector ? __mmask16(0) : lanes(count - kVector);
}

FASTADV_AVX512_INLINE __m512 parameter(const float* values, int64_t c, __mmask16 live,
                                       float otherwise) {
  return values ? _mm512_maskz_loadu_ps(live, values + c) : constant(otherwise);
}

FASTADV_AVX512 void norm_rows(uint16_t* out, float* statistics, const uint16_t* x, const Norm& norm,
                              int64_t count) {
  const int64_t channels = norm.channels;
  for (int64_t row = 0; row < count; ++row, x += channels, out += channels) {
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t c = 0; c < channels; c += 2 * kVector) {
      total[0] = _mm512_add_ps(total[0], load_bf16(x + c, lanes(channels - c)));
      total[1] = _mm512_add_ps(total[1], load_bf16(x + c + kVector, rest(channels - c)));
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1])) / float(channels);
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t c = 0; c < channels; c += 2 * kVector) {
      const __mmask16 live[] = {lanes(channels - c), rest(channels - c)};
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m512 value = load_bf16(x + c + i * kVector, live[i]);
        const __m512 off = _mm512_maskz_sub_ps(live[i], value, constant(mean));
        squares[i] = _mm512_fmadd_ps(off, off, squares[i]);
      }
    }
    const float variance =
        _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])) / float(channels);
    const float scale = 1.0f / __builtin_sqrtf(variance + norm.eps);
    statistics[2 * row] = mean;
    statistics[2 * row + 1] = scale;
    for (int64_t c = 0; c < channels; c += kVector) {
      const __mmask16 live = lanes(channels - c);
      const __m512 off = _mm512_sub_ps(load_bf16(x + c, live), constant(mean));
      const __m512 wide = _mm512_mul_ps(off, constant(scale));
      put(out + c,
          _mm512_fmadd_ps(wide, parameter(norm.weight, c, live, 1.0f),
                          parameter(norm.bias, c, live, 0.0f)),
          live);
    }
  }
}

FASTADV_AVX512 void norm_rows_backward(uint16_t* out, const uint16_t* gradient, const uint16_t* x,
                                       const float* statistics, const uint16_t* add,
                                       const Norm& norm, int64_t count) {
  const int64_t channels = norm.channels;
  for (int64_t row = 0; row < count; ++row) {
    const int64_t at = row * channels;
    const __m512 mean = constant(statistics[2 * row]), scale = constant(statistics[2 * row + 1]);
    __m512 total = _mm512_setzero_ps(), along = _mm512_setzero_ps();
    for (int64_t c = 0; c < channels; c += kVector) {
      const __mmask16 live = lanes(channels - c);
      const __m512 g =
          _mm512_mul_ps(load_bf16(gradient + at + c, live), parameter(norm.weight, c, live, 1.0f));
      total = _mm512_add_ps(total, g);
      along = _mm512_fmadd_ps(g, _mm512_sub_ps(load_bf16(x + at + c, live), mean), along);
    }
    // Lanes that do not exist have a gradient of 0.
    const float inverse = 1.0f / float(channels);
    const float s = statistics[2 * row + 1];
    const __m512 shift = constant(_mm512_reduce_add_ps(total) * inverse);
    const __m512 slope = constant(_mm512_reduce_add_ps(along) * inverse * s * s);
    for (int64_t c = 0; c < channels; c += kVector) {
      const __mmask16 live = lanes(channels - c);
      const __m512 g =
          _mm512_mul_ps(load_bf16(gradient + at + c, live), parameter(norm.weight, c, live, 1.0f));
      const __m512 off = _mm512_sub_ps(load_bf16(x + at + c, live), mean);
      __m512 value = _mm512_mul_ps(scale, _mm512_fnmadd_ps(off, slope, _mm512_sub_ps(g, shift)));
      if (add) value = _mm512_add_ps(value, load_bf16(add + at + c, live));
      put(out + at + c, value, live);
    }
  }
}

FASTADV_AVX512 void gate_rows(uint16_t* out, const uint16_t* x, const uint16_t* gate,
                              int64_t pixels, int64_t channels) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, out += channels) {
    for (int64_t c = 0; c < channels; c += kVector) {
      const __mmask16 live = lanes(channels - c);
      put(out + c, _mm512_mul_ps(load_bf16(x + c, live), load_bf16(gate + c, live)), live);
    }
  }
}

FASTADV_AVX512 void gate_rows_backward(uint16_t* out, float* sums, const uint16_t* gradient,
                                       const uint16_t* x, const uint16_t* gate, int64_t pixels,
                                       int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t at = pixel * channels;
    for (int64_t c = 0; c < channels; c += kVector) {
      const __mmask16 live = lanes(channels - c);
      const __m512 g = load_bf16(gradient + at + c, live);
      const __m512 sum = _mm512_maskz_loadu_ps(live, sums + c);
      _mm512_mask_storeu_ps(sums + c, live, _mm512_fmadd_ps(g, load_bf16(x + at + c, live), sum));
      put(out + at + c, _mm512_mul_ps(g, load_bf16(gate + c, live)), live);
    }
  }
}

FASTADV_AVX512 void softmax_rows(uint16_t* scores, const uint16_t* mask, int64_t mask_rows,
                                 float scale, int64_t first_row, int64_t count, int64_t n) {
  alignas(64) float row[kMostTokens + kVector];
  const __m512 lowest = constant(-3.0e38f);
  for (int64_t r = 0; r < count; ++r, scores += n) {
    const uint16_t* more = mask ? mask + (first_row + r) % mask_rows * n : nullptr;
    __m512 largest = lowest;
    for (int64_t c = 0; c < n; c += kVector) {
      const __mmask16 live = lanes(n - c);
      __m512 value = _mm512_mul_ps(load_bf16(scores + c, live), constant(scale * kLog2e));
      if (more) value = _mm512_fmadd_ps(load_bf16(more + c, live), constant(kLog2e), value);
      value = _mm512_mask_mov_ps(lowest, live, value);
      largest = _mm512_max_ps(largest, value);
      _mm512_store_ps(row + c, value);
    }
    const __m512 top = constant(_mm512_reduce_max_ps(largest));
    __m512 total = _mm512_setzero_ps();
    for (int64_t c = 0; c < n; c += kVector) {
      const __m512 e = power_of_two(
          _mm512_max_ps(constant(-126.0f), _mm512_sub_ps(_mm512_load_ps(row + c), top)));
      total = _mm512_add_ps(total, _mm512_maskz_mov_ps(lanes(n - c), e));
      _mm512_store_ps(row + c, e);
    }
    const __m512 inverse = constant(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t c = 0; c < n; c += kVector) {
      put(scores + c, _mm512_mul_ps(_mm512_load_ps(row + c), inverse), lanes(n - c));
    }
  }
}

FASTADV_AVX512 void softmax_rows_backward(uint16_t* gradient, const uint16_t* weights, float scale,
                                          int64_t count, int64_t n) {
  for (int64_t r = 0; r < count; ++r, gradient += n, weights += n) {
    __m512 along = _mm512_setzero_ps();
    for (int64_t c = 0; c < n; c += kVector) {
      const __mmask16 live = lanes(n - c);
      along = _mm512_fmadd_ps(load_bf16(gradient + c, live), load_bf16(weights + c, live), along);
    }
    const __m512 mean = constant(_mm512_reduce_add_ps(along));
    for (int64_t c = 0; c < n; c += kVector) {
      const __mmask16 live = lanes(n - c);
      const __m512 apart = _mm512_sub_ps(load_bf16(gradient + c, live), mean);
      const __m512 share = _mm512_mul_ps(load_bf16(weights + c, live), constant(scale));
      put(gradient + c, _mm512_mul_ps(apart, share), live);
    }
  }
}

FASTADV_AVX512 void affine_rows(uint16_t* out, const uint16_t* x, int64_t stride,
                                const float* scale, const float* shift, bool relu, int64_t count,
                                int64_t channels) {
  const __m512 least = constant(relu ? 0.0f : -__builtin_inff());
  for (int64_t row = 0; row < count; ++row, x += stride, out += channels) {
    for (int64_t c = 0; c < channels; c += kVector) {
      const __mmask16 live = lanes(channels - c);
      const __m512 value =
          _mm512_fmadd_ps(load_bf16(x + c, live), _mm512_maskz_loadu_ps(live, scale + c),
                          _mm512_maskz_loadu_ps(live, shift + c));
      put(out + c, _mm512_max_ps(least, value), live);
    }
  }
}

FASTADV_AVX512 void scale_rows(uint16_t* total, int64_t stride, const uint16_t* gradient,
                               const float* scale, bool add, int64_t count, int64_t channels) {
  for (int64_t row = 0; row < count; ++row, total += stride, gradient += channels) {
    for (int64_t c = 0; c < channels; c += kVector) {
      const __mmask16 live = lanes(channels - c);
      const __m512 before = add ? load_bf16(total + c, live) : _mm512_setzero_ps();
      put(total + c,
          _mm512_fmadd_ps(load_bf16(gradient + c, live), _mm512_maskz_loadu_ps(live, scale + c),
                          before),
          live);
    }
  }
}

}  // namespace

void strided_affine(uint16_t* out, const uint16_t* x, int64_t stride, const float* scale,
                    const float* shift, bool relu, int64_t count, int64_t channels) {
  affine_rows(out, x, stride, scale, shift, relu, count, channels);
}

void strided_scale(uint16_t* total, int64_t stride, const uint16_t* gradient, const float* scale,
                   bool add, int64_t count, int64_t channels) {
  scale_rows(total, stride, gradient, scale, add, count, channels);
}

void activate(uint16_t* out, const uint16_t* x, int64_t count, Activation kind) {
  kForward[int64_t(kind)](out, nullptr, x, count);
}

void activate_backward(uint16_t* out, const uint16_t* gradient, const uint16_t* x, int64_t count,
                       Activation kind) {
  kBackward[int64_t(kind)](out, gradient, x, count);
}

void layer_norm(uint16_t* out, float* statistics, const uint16_t* x, const Norm& norm,
                int64_t count) {
  norm_rows(out, statistics, x, norm, count);
}

void layer_norm_backward(uint16_t* out, const uint16_t* gradient, const uint16_t* x,
                         const float* statistics, const uint16_t* add, const Norm& norm,
                         int64_t count) {
  norm_rows_backward(out, gradient, x, statistics, add, norm, count);
}

void gate(uint16_t* out, const uint16_t* x, const uint16_t* gate, int64_t pixels,
          int64_t channels) {
  gate_rows(out, x, gate, pixels, channels);
}

void gate_backward(uint16_t* out, float* sums, const uint16_t* gradient, const uint16_t* x,
                   const uint16_t* gate, int64_t pixels, int64_t channels) {
  gate_rows_backward(out, sums, gradient, x, gate, pixels, channels);
}

void attention_weights(uint16_t* scores, const uint16_t* mask, int64_t mask_rows, float scale,
                       int64_t first_row, int64_t count, int64_t n) {
  softmax_rows(scores, mask, mask_rows, scale, first_row, count, n);
}

void attention_weights_backward(uint16_t* gradient, const uint16_t* weights, float scale,
                                int64_t count, int64_t n) {
  softmax_rows_backward(gradient, weights, scale, count, n);
}

}  // namespace fastadv::rows

#else

namespace fastadv::rows {

void activate(uint16_t*, const uint16_t*, int64_t, Activation) {}
void activate_backward(uint16_t*, const uint16_t*, const uint16_t*, int64_t, Activation) {}
void layer_norm(uint16_t*, float*, const uint16_t*, const Norm&, int64_t) {}
void layer_norm_backward(uint16_t*, const uint16_t*, const uint16_t*, const float*, const uint16_t*,
                         const Norm&, int64_t) {}
void gate(uint16_t*, const uint16_t*, const uint16_t*, int64_t, int64_t) {}
void gate_backward(uint16_t*, float*, const uint16_t*, const uint16_t*, const uint16_t*, int64_t,
                   int64_t) {}

void strided_affine(uint16_t*, const uint16_t*, int64_t, const float*, const float*, bool, int64_t,
                    int64_t) {}
void strided_scale(uint16_t*, int64_t, const uint16_t*, const float*, bool, int64_t, int64_t) {}
void attention_weights(uint16_t*, const uint16_t*, int64_t, float, int64_t, int64_t, int64_t) {}
void attention_weights_backward(uint16_t*, const uint16_t*, float, int64_t, int64_t) {}

}  // namespace fastadv::rows

#endif
