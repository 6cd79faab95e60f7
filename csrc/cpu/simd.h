// What every CPU kernel is written with: run-time SIMD dispatch and the storage types.
#pragma once

#include <c10/util/Half.h>

#include <bit>
#include <cstdint>
#include <type_traits>

// A function marked FASTADV_CLONES is compiled once per SIMD level, and the loader picks the widest
// that the processor has. What it calls must be FASTADV_INLINE, or it stays at the baseline.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define FASTADV_HAS_CLONES 1
#ifdef __SANITIZE_THREAD__  // which is not ready yet when the loader asks what picks a clone
#define FASTADV_CLONES
#else
#define FASTADV_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
#else
#define FASTADV_HAS_CLONES 0
#define FASTADV_CLONES
#endif

// A function marked FASTADV_AVX512_ONLY may be called where `has_avx512` alone. So may what is
// inlined into it, which is how vectors of 64 bytes become registers.
#if FASTADV_HAS_CLONES
#define FASTADV_AVX512_ONLY __attribute__((target("arch=x86-64-v4")))
#else
#define FASTADV_AVX512_ONLY
#endif
#define FASTADV_INLINE inline __attribute__((always_inline))

namespace fastadv {

inline bool has_avx512() {
#if FASTADV_HAS_CLONES
  return __builtin_cpu_supports("x86-64-v4");
#else
  return false;
#endif
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type in which a storage type is computed.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

FASTADV_INLINE float load(float v) { return v; }
FASTADV_INLINE double load(double v) { return v; }
FASTADV_INLINE float load(BFloat16 v) { return std::bit_cast<float>(uint32_t(v.bits) << 16); }
FASTADV_INLINE float load(Half v) { return c10::detail::fp16_ieee_to_fp32_value(v.bits); }

FASTADV_INLINE void store(float& to, float v) { to = v; }
FASTADV_INLINE void store(double& to, double v) { to = v; }
FASTADV_INLINE void store(BFloat16& to, float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // nearest, ties to even
  to.bits = uint16_t(v == v ? rounded : 0x7fc0);
}
FASTADV_INLINE void store(Half& to, float v) {
  to.bits = c10::detail::fp16_ieee_from_fp32_value(v);
}

// A positive double rounded to 24 significant bits: what a float would hold if it had the range.
// The reason is in fastadv/ops/pgd_step_reference.py.
inline double rounded_to_float_precision(double v) {
  constexpr int kDropped = 29;
  const uint64_t bits = std::bit_cast<uint64_t>(v) + (uint64_t(1) << (kDropped - 1));
  return std::bit_cast<double>(bits >> kDropped << kDropped);
}

// Elements a task works on: large enough to hide the cost of a task, small enough to stay in the L1
// cache.
constexpr int64_t kGrain = 32768;

}  // namespace fastadv
