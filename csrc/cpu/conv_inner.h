// Vectors of bfloat16 and the last pass over a result, for all our convolutions. Only for files
// compiled without torch's headers; AVX512-BF16 must be there when this code runs.
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

// Two bfloat16 numbers in every lane. Clang 16 crashes if it can optimise the broadcast; Clang 19
// does not.
FASTADV_AVX512_INLINE __m512bh broadcast_pair(int32_t pair) {
  __m512i lanes = _mm512_set1_epi32(pair);
#if defined(__clang__) && __clang_major__ < 19
  asm("" : "+v"(lanes));
#endif
  return (__m512bh)lanes;
}

// Finishes 16 results, of which the lanes in `live` exist, and stores them. `at` counts from the
// tensors' beginnings.
FASTADV_AVX512_INLINE void finish(uint16_t* out, __m512 value, const Epilogue& epilogue, int64_t at,
                                  int64_t channel, __mmask16 live) {
  if (epilogue.bias) {
    value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(live, epilogue.bias + channel));
  }
  if (epilogue.add) value = _mm512_add_ps(value, load_bf16(epilogue.add + at, live));
  // The maximum is its second argument where one of the two is NaN: NaN stays.
  if (epilogue.relu) value = _mm512_max_ps(_mm512_setzero_ps(), value);
  if (epilogue.mask) {
    const __m512 sign = load_bf16(epilogue.mask + at, live);
    const __mmask16 positive = _mm512_cmp_ps_mask(sign, _mm512_setzero_ps(), _CMP_GT_OQ);
    value = _mm512_maskz_mov_ps(positive, value);
  }
  // A masked store takes several times as long on some processors.
  if (live == 0xffff) {
    store_bf16(out + at, value);
  } else {
    _mm256_mask_storeu_epi16(out + at, live, (__m256i)_mm512_cvtneps_pbh(value));
  }
}

}  // namespace
}  // namespace fastadv::conv
