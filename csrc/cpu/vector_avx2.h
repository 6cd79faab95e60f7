// Vectors of 8 floats, for files that are compiled for AVX2 without torch's headers. As
// csrc/cpu/vector_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastadv::vec {
namespace {

using V = __m256;
constexpr int kLanes = 8;

struct Live {  // the lanes that exist
  __m256i mask;
  bool all;
};

FASTADV_LEVEL_INLINE Live live_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int32_t bounded = count < kLanes ? int32_t(count) : kLanes;
  return {_mm256_cmpgt_epi32(_mm256_set1_epi32(bounded), lane), count >= kLanes};
}
FASTADV_LEVEL_INLINE bool all(const Live& live) { return live.all; }

FASTADV_LEVEL_INLINE V zero() { return _mm256_setzero_ps(); }
FASTADV_LEVEL_INLINE V constant(float value) { return _mm256_set1_ps(value); }
FASTADV_LEVEL_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
FASTADV_LEVEL_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
FASTADV_LEVEL_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
FASTADV_LEVEL_INLINE V fmadd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
FASTADV_LEVEL_INLINE V fnmadd(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
// The maximum is its second argument where one of the two is NaN: NaN stays.
FASTADV_LEVEL_INLINE V at_least_zero(V v) { return _mm256_max_ps(zero(), v); }

// v where sign > 0, else 0.
FASTADV_LEVEL_INLINE V where_positive(V sign, V v) {
  return _mm256_and_ps(_mm256_cmp_ps(sign, zero(), _CMP_GT_OQ), v);
}

FASTADV_LEVEL_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
FASTADV_LEVEL_INLINE V load(const float* p, const Live& live) {
  return _mm256_maskload_ps(p, live.mask);
}
FASTADV_LEVEL_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
FASTADV_LEVEL_INLINE void store(float* p, V v, const Live& live) {
  _mm256_maskstore_ps(p, live.mask, v);
}

// The sum of all lanes.
FASTADV_LEVEL_INLINE float sum(V v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

// Floats that lie `stride` floats apart.
FASTADV_LEVEL_INLINE V gather(const float* p, int64_t stride, const Live& live) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i places = _mm256_mullo_epi32(lane, _mm256_set1_epi32(int32_t(stride)));
  return _mm256_mask_i32gather_ps(zero(), p, places, _mm256_castsi256_ps(live.mask), 4);
}

}  // namespace
}  // namespace fastadv::vec
