// The inner loops of csrc/cpu/conv3x3.h. Kept apart from torch's headers, so that none of their
// inline functions is compiled for a processor that may not be there.
#include "cpu/conv3x3.h"

#if defined(__x86_64__) && defined(__linux__)
#include "cpu/conv_inner.h"

namespace fastadv::conv3x3 {

using conv::constant;
using conv::load_bf16;
using conv::store_bf16;

namespace {

// The transforms evaluate polynomials at 0, +-a, +-b and infinity. The usual +-1, +-2 make numbers
// of very different sizes, and rounding them to bfloat16 twice the error: .025 of the result's norm
// on normal data, against .011 with these.
constexpr float kA = 0.625f, kA2 = kA * kA;
constexpr float kB = 1.5f, kB2 = kB * kB;

// The transform of inputs along one axis.
FASTADV_AVX512_INLINE void transform_input(__m512 (&r)[6], const __m512 (&d)[6]) {
  const __m512 a2 = constant(kA2), b2 = constant(kB2), sum = constant(kA2 + kB2);
  const __m512 even_a = _mm512_fnmadd_ps(b2, d[2], d[4]), even_b = _mm512_fnmadd_ps(a2, d[2], d[4]);
  const __m512 odd_a = _mm512_mul_ps(constant(kA), _mm512_fnmadd_ps(b2, d[1], d[3]));
  const __m512 odd_b = _mm512_mul_ps(constant(kB), _mm512_fnmadd_ps(a2, d[1], d[3]));
  const __m512 product = constant(kA2 * kB2);
  r[0] = _mm512_fmadd_ps(product, d[0], _mm512_fnmadd_ps(sum, d[2], d[4]));
  r[1] = _mm512_add_ps(even_a, odd_a);
  r[2] = _mm512_sub_ps(even_a, odd_a);
  r[3] = _mm512_add_ps(even_b, odd_b);
  r[4] = _mm512_sub_ps(even_b, odd_b);
  r[5] = _mm512_fmadd_ps(product, d[1], _mm512_fnmadd_ps(sum, d[3], d[5]));
}

// The transform of results along one axis.
FASTADV_AVX512_INLINE void transform_output(__m512 (&y)[4], const __m512 (&m)[6]) {
  const __m512 sum_a = _mm512_add_ps(m[1], m[2]), difference_a = _mm512_sub_ps(m[1], m[2]);
  const __m512 sum_b = _mm512_add_ps(m[3], m[4]), difference_b = _mm512_sub_ps(m[3], m[4]);
  y[0] = _mm512_add_ps(m[0], _mm512_add_ps(sum_a, sum_b));
  y[1] = _mm512_fmadd_ps(constant(kA), difference_a, _mm512_mul_ps(constant(kB), difference_b));
  y[2] = _mm512_fmadd_ps(constant(kA2), sum_a, _mm512_mul_ps(constant(kB2), sum_b));
  y[3] = _mm512_fmadd_ps(constant(kA2 * kA), difference_a,
                         _mm512_fmadd_ps(constant(kB2 * kB), difference_b, m[5]));
}

// m[rows][vectors * 16] = v[rows][channels] times a block of transformed filters [channels /
// 2][vectors * 16][2].
template <int rows, int vectors>
FASTADV_AVX512 void multiply(float* m, const uint16_t* v, const uint16_t* filters,
                             int64_t channels) {
  __m512 sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) sum[r][n] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < channels; c += 2) {
    __m512bh filter[vectors];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      filter[n] = (__m512bh)_mm512_loadu_si512(filters + (c * vectors + 2 * n) * conv::kVector);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const __m512bh input = conv::broadcast_pair(*(const int32_t*)(v + r * channels + c));
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], input, filter[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      _mm512_storeu_ps(m + (r * vectors + n) * conv::kVector, sum[r][n]);
    }
  }
}

template <int vectors>
void multiply_rows(float* m, const uint16_t* v, const uint16_t* filters, int64_t channels,
                   int64_t rows) {
  while (rows > 0) {
    const int64_t now = conv::next_rows(rows);
    switch (now) {
      case 6:
        multiply<6, vectors>(m, v, filters, channels);
        break;
      case 5:
        multiply<5, vectors>(m, v, filters, channels);
        break;
      case 4:
        multiply<4, vectors>(m, v, filters, channels);
        break;
      case 3:
        multiply<3, vectors>(m, v, filters, channels);
        break;
      case 2:
        multiply<2, vectors>(m, v, filters, channels);
        break;
      default:
        multiply<1, vectors>(m, v, filters, channels);
        break;
    }
    m += now * vectors * conv::kVector;
    v += now * channels;
    rows -= now;
  }
}

void multiply_block(float* m, const uint16_t* v, const uint16_t* filters, int64_t channels,
                    int64_t rows, int64_t width) {
  switch (width / conv::kVector) {
    case 4:
      return multiply_rows<4>(m, v, filters, channels, rows);
    case 3:
      return multiply_rows<3>(m, v, filters, channels, rows);
    case 2:
      return multiply_rows<2>(m, v, filters, channels, rows);
    default:
      return multiply_rows<1>(m, v, filters, channels, rows);
  }
}

struct TilePlace {
  int64_t image, row, column;  // of the tile's first result
};

TilePlace place_of(const Shape& shape, int64_t tile) {
  const int64_t across = shape.tiles_across(), per_image = across * shape.tiles_down();
  const int64_t within = tile % per_image;
  return {tile / per_image, within / across * kTile, within % across * kTile};
}

// Reads one tile's 6x6 inputs and writes its 36 transformed rows: v[point * stride + channel].
FASTADV_AVX512 void gather_tile(uint16_t* v, int64_t stride, const uint16_t* x, const Shape& shape,
                                const TilePlace& place) {
  const int64_t channels = shape.in_channels;
  const uint16_t* image = x + place.image * shape.height * shape.width * channels;
  const uint16_t* source[6][6];
  for (int i = 0; i < 6; ++i) {
    for (int j = 0; j < 6; ++j) {
      const int64_t row = place.row + i - 1, column = place.column + j - 1;
      const bool inside = row >= 0 && row < shape.height && column >= 0 && column < shape.width;
      source[i][j] = inside ? image + (row * shape.width + column) * channels : nullptr;
    }
  }
  for (int64_t c = 0; c < channels; c += kVector) {
    __m512 half[6][6];
    for (int j = 0; j < 6; ++j) {
      __m512 d[6], r[6];
      for (int i = 0; i < 6; ++i) {
        d[i] = source[i][j] ? load_bf16(source[i][j] + c) : _mm512_setzero_ps();
      }
      transform_input(r, d);
      for (int i = 0; i < 6; ++i) half[i][j] = r[i];
    }
    for (int i = 0; i < 6; ++i) {
      __m512 r[6];
      transform_input(r, half[i]);
      for (int j = 0; j < 6; ++j) store_bf16(v + (i * 6 + j) * stride + c, r[j]);
    }
  }
}

// Transforms one tile's 36 products back and stores its 4x4 results of `width` channels from
// `channel` on.
FASTADV_AVX512 void scatter_tile(uint16_t* out, const float* m, int64_t stride, int64_t width,
                                 const Shape& shape, const TilePlace& place, int64_t channel,
                                 const Epilogue& epilogue) {
  for (int64_t c = 0; c < width; c += kVector) {
    const __mmask16 live = conv::lanes(shape.out_channels - channel - c);
    __m512 half[4][6];
    for (int j = 0; j < 6; ++j) {
      __m512 column[6], y[4];
      for (int i = 0; i < 6; ++i) column[i] = _mm512_loadu_ps(m + (i * 6 + j) * stride + c);
      transform_output(y, column);
      for (int i = 0; i < 4; ++i) half[i][j] = y[i];
    }
    for (int i = 0; i < kTile && place.row + i < shape.height; ++i) {
      __m512 y[4];
      transform_output(y, half[i]);
      for (int j = 0; j < kTile && place.column + j < shape.width; ++j) {
        const int64_t pixel =
            (place.image * shape.height + place.row + i) * shape.width + place.column + j;
        const int64_t at = pixel * shape.out_channels + channel + c;
        conv::finish(out, y[j], epilogue, at, channel + c, live);
      }
    }
  }
}

}  // namespace

int64_t scratch_bytes(const Shape& shape, int64_t tiles) {
  return kPoints * tiles * (shape.in_channels * 2 + kWide * 4);
}

void convolve(uint16_t* out, const uint16_t* x, const uint16_t* packed, const Shape& shape,
              const Epilogue& epilogue, int64_t first, int64_t count, void* scratch) {
  const int64_t in = shape.in_channels, channels = conv::padded(shape.out_channels);
  float* m = static_cast<float*>(scratch);
  uint16_t* v = reinterpret_cast<uint16_t*>(m + kPoints * count * kWide);
  for (int64_t t = 0; t < count; ++t) {
    gather_tile(v + t * in, count * in, x, shape, place_of(shape, first + t));
  }
  for (int64_t channel = 0; channel < channels; channel += kWide) {
    const int64_t width = channels - channel < kWide ? channels - channel : kWide;
    for (int64_t point = 0; point < kPoints; ++point) {
      const uint16_t* filters = packed + (point * channels + channel) * in;
      float* products = m + point * count * width;
      multiply_block(products, v + point * count * in, filters, in, count, width);
    }
    for (int64_t t = 0; t < count; ++t) {
      scatter_tile(out, m + t * width, count * width, width, shape, place_of(shape, first + t),
                   channel, epilogue);
    }
  }
}

namespace {

// The transform of filters along one axis.
FASTADV_AVX512_INLINE void transform_filter(__m512 (&u)[6], __m512 g0, __m512 g1, __m512 g2) {
  const __m512 share_a = constant(1 / (2 * kA2 * (kA2 - kB2)));
  const __m512 share_b = constant(1 / (2 * kB2 * (kB2 - kA2)));
  const __m512 even_a = _mm512_mul_ps(share_a, _mm512_fmadd_ps(constant(kA2), g2, g0));
  const __m512 even_b = _mm512_mul_ps(share_b, _mm512_fmadd_ps(constant(kB2), g2, g0));
  const __m512 odd_a = _mm512_mul_ps(share_a, _mm512_mul_ps(constant(kA), g1));
  const __m512 odd_b = _mm512_mul_ps(share_b, _mm512_mul_ps(constant(kB), g1));
  u[0] = _mm512_mul_ps(constant(1 / (kA2 * kB2)), g0);
  u[1] = _mm512_add_ps(even_a, odd_a);
  u[2] = _mm512_sub_ps(even_a, odd_a);
  u[3] = _mm512_add_ps(even_b, odd_b);
  u[4] = _mm512_sub_ps(even_b, odd_b);
  u[5] = g2;
}

// The 36 transformed values of 16 output channels and one input channel.
FASTADV_AVX512_INLINE void transform_sixteen(__m512 (&u)[6][6], const Filters& f, int64_t out,
                                             int64_t in) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int32_t(f.out_stride)));
  const float* base = f.weight + out * f.out_stride + in * f.in_stride;
  const __mmask16 live = conv::lanes(f.out_channels - out);
  __m512 scale = constant(1);
  if (f.scale) {
    scale = f.scale_by_input ? constant(f.scale[in]) : _mm512_maskz_loadu_ps(live, f.scale + out);
  }
  __m512 g[3][3];
  for (int k = 0; k < 9; ++k) {
    const int from = f.rotated ? 8 - k : k;
    const __m512 taps = _mm512_mask_i32gather_ps(constant(0), live, places, base + from * f.tap_stride, 4);
    g[k / 3][k % 3] = _mm512_mul_ps(scale, taps);
  }
  __m512 half[6][3];
  for (int j = 0; j < 3; ++j) {
    __m512 column[6];
    transform_filter(column, g[0][j], g[1][j], g[2][j]);
    for (int i = 0; i < 6; ++i) half[i][j] = column[i];
  }
  for (int i = 0; i < 6; ++i) transform_filter(u[i], half[i][0], half[i][1], half[i][2]);
}

}  // namespace

FASTADV_AVX512 void transform_filters(uint16_t* packed, const Filters& f, int64_t out) {
  const int64_t block = out / kWide * kWide, channels = conv::padded(f.out_channels);
  const int64_t width = channels - block < kWide ? channels - block : kWide;
  for (int64_t in = 0; in < f.in_channels; in += 2) {
    __m512 even[6][6], odd[6][6];
    transform_sixteen(even, f, out, in);
    transform_sixteen(odd, f, out, in + 1);
    for (int point = 0; point < kPoints; ++point) {
      // Pairs of input channels lie side by side: the low half of each 32-bit word is the even one.
      const __m512i low =
          _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even[point / 6][point % 6]));
      const __m512i high =
          _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd[point / 6][point % 6]));
      uint16_t* to =
          packed + (point * channels + block) * f.in_channels + in * width + 2 * (out - block);
      _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

}  // namespace fastadv::conv3x3

#else

namespace fastadv::conv3x3 {

int64_t scratch_bytes(const Shape&, int64_t) { return 0; }
void transform_filters(uint16_t*, const Filters&, int64_t) {}
void convolve(uint16_t*, const uint16_t*, const uint16_t*, const Shape&, const Epilogue&, int64_t,
              int64_t, void*) {}

}  // namespace fastadv::conv3x3

#endif
