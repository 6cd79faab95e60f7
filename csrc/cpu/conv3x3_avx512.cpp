// The inner loops of csrc/cpu/conv3x3.h. Kept apart from torch's headers, so that none of their
// inline functions is compiled for a processor that may not be there.
#include "cpu/conv3x3.h"

#if defined(__x86_64__) && defined(__linux__)
#include "cpu/conv_inner.h"
#define FASTADV_LEVEL FASTADV_AVX512
#define FASTADV_LEVEL_INLINE FASTADV_AVX512_INLINE
#include "cpu/vector_avx512.h"

namespace fastadv::vec {
namespace {

FASTADV_AVX512_INLINE V load(const uint16_t* p) { return conv::load_bf16(p); }
FASTADV_AVX512_INLINE void store(uint16_t* p, V v) { conv::store_bf16(p, v); }

}  // namespace
}  // namespace fastadv::vec

#include "cpu/conv3x3_tiles.h"

namespace fastadv::conv3x3 {
namespace {

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

FASTADV_AVX512 void transform_filters(uint16_t* packed, const Filters& f, int64_t out) {
  const int64_t block = out / kWide * kWide, channels = conv::padded(f.out_channels);
  const int64_t width = channels - block < kWide ? channels - block : kWide;
  for (int64_t in = 0; in < f.in_channels; in += 2) {
    V even[6][6], odd[6][6];
    transform_taps(even, f, out, in);
    transform_taps(odd, f, out, in + 1);
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
