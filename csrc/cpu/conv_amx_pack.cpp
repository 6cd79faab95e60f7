// Whether there is AMX, and its filters. Apart from torch's headers as conv3x3_avx512.cpp is.
#include "cpu/conv_amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "cpu/conv_inner.h"

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

FASTADV_AVX512 void pack(uint16_t* packed, const Filters& f, int64_t out) {
  const int64_t tiles = std::min(conv::padded(f.out_channels) - out, kBlock) / conv::kVector;
  const int64_t row = f.backward ? f.out_channels : f.in_channels;  // C
  const int64_t out_stride = f.backward ? f.size : row * f.size;
  const int64_t in_stride = f.backward ? row * f.size : f.size;
  for (int64_t c = 0; c < f.in_channels; c += kDepth) {
    for (int64_t t = 0; t < f.tap_count; ++t) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = out + tile * conv::kVector;
        const int64_t real = std::clamp<int64_t>(f.out_channels - first, 0, conv::kVector);
        for (int64_t o = 0; o < conv::kVector; ++o) {
          uint16_t* to = packed + 2 * o;
          if (o >= real) {
            for (int64_t k = 0; k < kDepth; ++k) to[k / 2 * kDepth + k % 2] = 0;
            continue;
          }
          const float* from = f.weight + (first + o) * out_stride + c * in_stride + f.taps[t];
          const float by_out = f.scale && !f.backward ? f.scale[first + o] : 1;
          for (int64_t k = 0; k < kDepth; ++k) {
            const float by_in = f.scale && f.backward ? f.scale[c + k] : by_out;
            const __m128 value = _mm_set_ss(from[k * in_stride] * by_in);
            to[k / 2 * kDepth + k % 2] =
                uint16_t(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(value), 0));
          }
        }
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
