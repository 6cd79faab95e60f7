// The instructions of AVX512-BF16 and AMX in plain AVX-512, for processors without them. Included
// before everything else (-include) into the files of csrc/cpu that use these instructions, which
// then run, slowly, on every processor with AVX-512, and under AddressSanitizer.
//
// The numbers are those of the instructions up to the rounding of sums. Numbers below 2^-126 are 0
// in both.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#define FASTADV_EMULATED \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"), noinline, unused)) static

namespace fastadv_emulated {

// What vcvtneps2bf16 does to one number: to the nearest, ties to even.
inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  if ((bits & 0x7f800000) == 0) return uint16_t(bits >> 31 << 15);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widened(uint16_t bits) {
  const uint32_t wide = (bits & 0x7f80) == 0 ? uint32_t(bits & 0x8000) << 16 : uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

FASTADV_EMULATED __m256i narrowed(__m512 values) {
  float from[16];
  uint16_t to[16];
  std::memcpy(from, &values, sizeof(from));
  for (int i = 0; i < 16; ++i) to[i] = narrow(from[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to));
}

FASTADV_EMULATED __m512i narrowed(__m512 high, __m512 low) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrowed(low)), narrowed(high), 1);
}

// Two products of each pair of numbers, added to a sum.
FASTADV_EMULATED __m512 added_products(__m512 sums, __m512i a, __m512i b) {
  float total[16];
  uint16_t left[32], right[32];
  std::memcpy(total, &sums, sizeof(total));
  std::memcpy(left, &a, sizeof(left));
  std::memcpy(right, &b, sizeof(right));
  for (int i = 0; i < 16; ++i) {
    total[i] += widened(left[2 * i + 1]) * widened(right[2 * i + 1]);
    total[i] += widened(left[2 * i]) * widened(right[2 * i]);
  }
  return _mm512_loadu_ps(total);
}

// The tile registers of a thread. They can be used between a configuration and a release alone.
struct Tiles {
  bool configured = false;
  int rows[8], row_bytes[8];
  alignas(64) uint8_t bytes[8][16][64];

  void configure(const void* from) {
    const auto* configuration = static_cast<const uint8_t*>(from);
    if (configuration[0] != 1) __builtin_trap();  // the only palette there is
    for (int tile = 0; tile < 8; ++tile) {
      std::memcpy(&row_bytes[tile], configuration + 16 + 2 * tile, 2);
      row_bytes[tile] &= 0xffff;
      rows[tile] = configuration[48 + tile];
      if (rows[tile] > 16 || row_bytes[tile] > 64) __builtin_trap();
    }
    configured = true;
    std::memset(bytes, 0, sizeof(bytes));
  }
  void check() const {
    if (!configured) __builtin_trap();  // an illegal instruction there
  }
  void zero(int tile) {
    check();
    std::memset(bytes[tile], 0, sizeof(bytes[tile]));
  }
  void load(int tile, const void* from, int64_t stride) {
    zero(tile);
    for (int row = 0; row < rows[tile]; ++row) {
      std::memcpy(bytes[tile][row], static_cast<const uint8_t*>(from) + row * stride,
                  size_t(row_bytes[tile]));
    }
  }
  void store(int tile, void* to, int64_t stride) const {
    check();
    for (int row = 0; row < rows[tile]; ++row) {
      std::memcpy(static_cast<uint8_t*>(to) + row * stride, bytes[tile][row],
                  size_t(row_bytes[tile]));
    }
  }
  // sums [M][N] += a [M][2 K] times b [K][2 N], whose pairs lie side by side.
  void multiply(int sums, int a, int b) {
    check();
    for (int m = 0; m < rows[sums]; ++m) {
      float total[16];
      uint16_t left[32];
      std::memcpy(total, bytes[sums][m], sizeof(total));
      std::memcpy(left, bytes[a][m], sizeof(left));
      for (int k = 0; k < rows[b]; ++k) {
        uint16_t right[32];
        std::memcpy(right, bytes[b][k], sizeof(right));
        for (int n = 0; n < 16; ++n) {
          total[n] += widened(left[2 * k]) * widened(right[2 * n]);
          total[n] += widened(left[2 * k + 1]) * widened(right[2 * n + 1]);
        }
      }
      std::memcpy(bytes[sums][m], total, sizeof(total));
    }
  }
};

inline thread_local Tiles tiles;

}  // namespace fastadv_emulated

#define _mm512_cvtneps_pbh(values) (::fastadv_emulated::narrowed(values))
#define _mm512_cvtne2ps_pbh(high, low) (::fastadv_emulated::narrowed(high, low))
#define _mm512_dpbf16_ps(sums, a, b) \
  (::fastadv_emulated::added_products(sums, (__m512i)(a), (__m512i)(b)))

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(tile, from, stride) ::fastadv_emulated::tiles.load(tile, from, stride)
#define _tile_stored(tile, to, stride) ::fastadv_emulated::tiles.store(tile, to, stride)
#define _tile_zero(tile) ::fastadv_emulated::tiles.zero(tile)
#define _tile_dpbf16ps(sums, a, b) ::fastadv_emulated::tiles.multiply(sums, a, b)
#define _tile_loadconfig(from) ::fastadv_emulated::tiles.configure(from)
#define _tile_release() (::fastadv_emulated::tiles.configured = false)

// The processor that is reported: with AVX512-BF16 and AMX, and an operating system that allows it.
#define __builtin_cpu_supports(name) \
  (std::strcmp(name, "avx512bf16") == 0 ? 1 : __builtin_cpu_supports(name))
#define __get_cpuid_count(leaf, part, a, b, c, d) \
  (*(a) = *(b) = *(c) = 0, *(d) = 1u << 22 | 1u << 24, 1)
#define syscall(...) 0L
