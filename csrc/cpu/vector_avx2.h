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
// Past the caches, to memory that is aligned for the vector.
FASTADV_LEVEL_INLINE void stream(float* p, V v) { _mm256_stream_ps(p, v); }
FASTADV_LEVEL_INLINE void store(float* p, V v, const Live& live) {
  _mm256_maskstore_ps(p, live.mask, v);
}

// The sums of up to 8 vectors, one in each lane. A lane's bits depend on its vector alone.
template <int count>
FASTADV_LEVEL_INLINE V sums_of(const V* v) {
  V pairs[4], fours[2];
#pragma GCC unroll 4
  for (int k = 0; 2 * k < count; ++k) {
    const V a = v[2 * k], b = v[2 * k + 1 < count ? 2 * k + 1 : 2 * k];
    pairs[k] = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
#pragma GCC unroll 2
  for (int k = 0; 4 * k < count; ++k) {
    const __m256d a = _mm256_castps_pd(pairs[2 * k]);
    const __m256d b = _mm256_castps_pd(pairs[4 * k + 2 < count ? 2 * k + 1 : 2 * k]);
    fours[k] =
        add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  const V a = fours[0], b = fours[count > 4 ? 1 : 0];
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// Floats that lie `stride` floats apart.
FASTADV_LEVEL_INLINE V gather(const float* p, int64_t stride, const Live& live) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i places = _mm256_mullo_epi32(lane, _mm256_set1_epi32(int32_t(stride)));
  return _mm256_mask_i32gather_ps(zero(), p, places, _mm256_castsi256_ps(live.mask), 4);
}

}  // namespace
}  // namespace fastadv::vec
