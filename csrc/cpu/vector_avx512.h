// Vectors of 16 floats, for files that are compiled for AVX-512 without torch's headers. The
// includer defines FASTADV_LEVEL_INLINE: how a function to be inlined is declared for the
// processor.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastadv::vec {
namespace {

using V = __m512;
using Live = __mmask16;  // the lanes that exist
constexpr int kLanes = 16;

FASTADV_LEVEL_INLINE Live live_lanes(int64_t count) {
  return count >= kLanes ? Live(0xffff) : Live((1u << count) - 1);
}
FASTADV_LEVEL_INLINE bool all(Live live) { return live == 0xffff; }

FASTADV_LEVEL_INLINE V zero() { return _mm512_setzero_ps(); }
FASTADV_LEVEL_INLINE V constant(float value) { return _mm512_set1_ps(value); }
FASTADV_LEVEL_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
FASTADV_LEVEL_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
FASTADV_LEVEL_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
FASTADV_LEVEL_INLINE V fmadd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
FASTADV_LEVEL_INLINE V fnmadd(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
// The maximum is its second argument where one of the two is NaN: NaN stays.
FASTADV_LEVEL_INLINE V at_least_zero(V v) { return _mm512_max_ps(zero(), v); }

// v where sign > 0, else 0.
FASTADV_LEVEL_INLINE V where_positive(V sign, V v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(sign, zero(), _CMP_GT_OQ), v);
}

FASTADV_LEVEL_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
FASTADV_LEVEL_INLINE V load(const float* p, Live live) { return _mm512_maskz_loadu_ps(live, p); }
FASTADV_LEVEL_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
// Past the caches, to memory that is aligned for the vector.
FASTADV_LEVEL_INLINE void stream(float* p, V v) { _mm512_stream_ps(p, v); }
FASTADV_LEVEL_INLINE void store(float* p, V v, Live live) { _mm512_mask_storeu_ps(p, live, v); }

// The sums of up to 16 vectors, one in each lane. A lane's bits depend on its vector alone.
template <int count>
FASTADV_LEVEL_INLINE V sums_of(const V* v) {
  V pairs[8], fours[4], halves[2];
#pragma GCC unroll 8
  for (int k = 0; 2 * k < count; ++k) {
    const V a = v[2 * k], b = v[2 * k + 1 < count ? 2 * k + 1 : 2 * k];
    pairs[k] = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 4
  for (int k = 0; 4 * k < count; ++k) {
    const __m512d a = _mm512_castps_pd(pairs[2 * k]);
    const __m512d b = _mm512_castps_pd(pairs[4 * k + 2 < count ? 2 * k + 1 : 2 * k]);
    fours[k] =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int k = 0; 8 * k < count; ++k) {
    const V a = fours[2 * k], b = fours[8 * k + 4 < count ? 2 * k + 1 : 2 * k];
    halves[k] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  const V a = halves[0], b = halves[count > 8 ? 1 : 0];
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Floats that lie `stride` floats apart.
FASTADV_LEVEL_INLINE V gather(const float* p, int64_t stride, Live live) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int32_t(stride)));
  return _mm512_mask_i32gather_ps(zero(), live, places, p, 4);
}

}  // namespace
}  // namespace fastadv::vec
