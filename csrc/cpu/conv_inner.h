// What our convolutions share: bfloat16 vectors, a register-blocked matrix product, and the last
// pass over a result. Only for files compiled without torch's headers; AVX512-BF16 must be there
// when this code runs.
#pragma once

#include <immintrin.h>

#include "cpu/conv_epilogue.h"

#define FASTADV_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define FASTADV_AVX512_INLINE \
  inline __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"), always_inline))

namespace fastadv::conv {
namespace {

// The first `count` of 16 lanes.
FASTADV_AVX512_INLINE __mmask16 lanes(int64_t count) {
  return count >= kVector ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

FASTADV_AVX512_INLINE __m512 load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

FASTADV_AVX512_INLINE __m512 load_bf16(const uint16_t* p, __mmask16 live) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, p)), 16));
}

FASTADV_AVX512_INLINE void store_bf16(uint16_t* p, __m512 v) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
}

FASTADV_AVX512_INLINE __m512 constant(float value) { return _mm512_set1_ps(value); }

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
      filter[n] = (__m512bh)_mm512_loadu_si512(filters + (c * vectors + 2 * n) * kVector);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const __m512bh input = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(v + r * channels + c));
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], input, filter[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      _mm512_storeu_ps(m + (r * vectors + n) * kVector, sum[r][n]);
    }
  }
}

template <int vectors>
void multiply_rows(float* m, const uint16_t* v, const uint16_t* filters, int64_t channels,
                   int64_t rows) {
  while (rows > 0) {
    // 6 x 4 sums fill the registers; a remainder is spread so that no group is tiny.
    const int64_t groups = (rows + 5) / 6, now = (rows + groups - 1) / groups;
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
    m += now * vectors * kVector;
    v += now * channels;
    rows -= now;
  }
}

void multiply_block(float* m, const uint16_t* v, const uint16_t* filters, int64_t channels,
                    int64_t rows, int64_t width) {
  switch (width / kVector) {
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

// Finishes 16 results, of which the lanes in `live` exist, and stores them. `at` counts from the
// tensors' beginnings.
FASTADV_AVX512_INLINE void finish(uint16_t* out, __m512 value, const Epilogue& epilogue, int64_t at,
                                  int64_t channel, __mmask16 live) {
  if (epilogue.bias) {
    value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(live, epilogue.bias + channel));
  }
  if (epilogue.add) value = _mm512_add_ps(value, load_bf16(epilogue.add + at, live));
  if (epilogue.relu) value = _mm512_max_ps(value, _mm512_setzero_ps());
  if (epilogue.mask) {
    const __m512 sign = load_bf16(epilogue.mask + at, live);
    const __mmask16 positive = _mm512_cmp_ps_mask(sign, _mm512_setzero_ps(), _CMP_GT_OQ);
    value = _mm512_maskz_mov_ps(positive, value);
  }
  _mm256_mask_storeu_epi16(out + at, live, (__m256i)_mm512_cvtneps_pbh(value));
}

}  // namespace
}  // namespace fastadv::conv
