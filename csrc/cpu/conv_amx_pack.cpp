// The check for AMX, and the packing of filters for it. Kept apart from torch's headers like
// conv3x3_avx512.cpp.
#include "cpu/conv_amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "cpu/conv_inner.h"

#define FASTADV_LEVEL_INLINE inline FASTADV_AVX512 __attribute__((always_inline))
#include "cpu/transpose_avx512.h"

namespace fastadv::conv_amx {
namespace {

constexpr int kAskForPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of arch_prctl
constexpr int kTileData = 18;              // the state component that holds the tiles

bool ask() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!conv::supported() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tiles = d >> 24 & 1;
  return bf16 && tiles && syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
}

}  // namespace

bool supported() {
  static const bool answer = ask();
  return answer;
}

// The filters of 16 output channels and 32 inputs at a tap, forward: an output channel's inputs lie
// side by side.
FASTADV_AVX512 static void pack_rows(uint16_t* tile, const Filters& f, int64_t first, int64_t c,
                                     int64_t tap, int64_t real) {
  __m512i rows[conv::kVector];
  for (int64_t o = 0; o < conv::kVector; ++o) {
    rows[o] = _mm512_setzero_si512();
    if (o < real) {
      const float* from = f.weight + ((first + o) * f.size + tap) * f.in_channels + c;
      _mm_prefetch(from + f.in_channels, _MM_HINT_T0);  // the next tap's, in memory far apart
      _mm_prefetch(from + f.in_channels + 16, _MM_HINT_T0);
      const __m512 by = _mm512_set1_ps(f.scale ? f.scale[first + o] : 1);
      rows[o] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from + 16), by),
                                             _mm512_mul_ps(_mm512_loadu_ps(from), by));
    }
  }
  vec::store_transposed(tile, rows);
}

// The same backward: an input channel's outputs lie side by side.
FASTADV_AVX512 static void pack_columns(uint16_t* tile, const Filters& f, int64_t first, int64_t c,
                                        int64_t tap, int64_t real) {
  const __mmask16 mask = __mmask16((1u << real) - 1);
  for (int64_t k = 0; k < kDepth; k += 2) {
    __m512i halves[2];
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t in = c + k + side;
      const float* from = f.weight + (in * f.size + tap) * f.out_channels + first;
      _mm_prefetch(from + f.out_channels, _MM_HINT_T0);
      const __m512 by = _mm512_set1_ps(f.scale ? f.scale[in] : 1);
      const __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from), by);
      halves[side] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
    }
    _mm512_storeu_si512(tile + k * conv::kVector,
                        _mm512_or_si512(halves[0], _mm512_slli_epi32(halves[1], 16)));
  }
}

FASTADV_AVX512 void pack(uint16_t* packed, const Filters& f, int64_t out) {
  const int64_t tiles = std::min(conv::padded(f.out_channels) - out, kBlock) / conv::kVector;
  for (int64_t c = 0; c < f.in_channels; c += kDepth) {
    for (int64_t t = 0; t < f.tap_count; ++t) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = out + tile * conv::kVector;
        const int64_t real = std::clamp<int64_t>(f.out_channels - first, 0, conv::kVector);
        (f.backward ? pack_columns : pack_rows)(packed, f, first, c, f.taps[t], real);
        packed += kRows * kDepth;
      }
    }
  }
}

}  // namespace fastadv::conv_amx

#else

namespace fastadv::conv_amx {

bool supported() { return false; }
void pack(uint16_t*, const Filters&, int64_t) {}

}  // namespace fastadv::conv_amx

#endif
