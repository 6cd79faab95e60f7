// A transposition in registers, for files that are compiled for AVX-512 without torch's headers.
// The includer defines FASTADV_LEVEL_INLINE, as for vector_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastadv::vec {
namespace {

// Stores 16 rows of 16 numbers of 32 bits as 16 columns, one after the other.
FASTADV_LEVEL_INLINE void store_transposed(void* to, const __m512i* v) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  auto* out = static_cast<__m512i*>(to);
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(out + i, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
    _mm512_storeu_si512(out + i + 8, _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
  }
}

}  // namespace
}  // namespace fastadv::vec
