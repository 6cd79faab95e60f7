// Run-time SIMD dispatch and the storage types, which every CPU kernel uses.
#pragma once

#include <c10/util/Half.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "cpu/isa_limit.h"

#define FASTADV_INLINE inline __attribute__((always_inline))

// The SIMD levels that a kernel is compiled for besides the compiler's baseline: the vector units
// of x86-64-v3 and of x86-64-v4, spelled out because not every compiler knows those names here.
#if defined(__x86_64__) && defined(__linux__)
#define FASTADV_HAS_SIMD_LEVELS 1
#define FASTADV_AVX2_ONLY __attribute__((target("avx2,bmi,bmi2,fma")))
#define FASTADV_AVX512_ONLY \
  __attribute__((target("avx2,bmi,bmi2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")))
#else
#define FASTADV_HAS_SIMD_LEVELS 0
#define FASTADV_AVX2_ONLY
#define FASTADV_AVX512_ONLY
#endif

// Evaluates a call in code of the widest SIMD level that the processor has. The function called,
// and what it calls, must be FASTADV_INLINE, or it stays at the baseline. `target_clones` would ask
// for less writing, but Clang refuses it on templates, and GCC 11 does not know the levels.
#define FASTADV_DISPATCH(...) \
  ::fastadv::at_simd_level([&]() __attribute__((always_inline)) { return __VA_ARGS__; })

namespace fastadv {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };

inline SimdLevel detect_simd_level() {
#if FASTADV_HAS_SIMD_LEVELS
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma"))) {
    return SimdLevel::kBaseline;
  }
  return isa_limit() >= IsaLimit::kAvx512 && __builtin_cpu_supports("avx512f") &&
                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? SimdLevel::kAvx512
             : SimdLevel::kAvx2;
#else
  return SimdLevel::kBaseline;
#endif
}

inline const SimdLevel kSimdLevel = detect_simd_level();

inline bool has_avx512() { return kSimdLevel == SimdLevel::kAvx512; }

template <class F>
FASTADV_AVX2_ONLY __attribute__((noinline)) auto with_avx2(const F& f) {
  return f();
}

template <class F>
FASTADV_AVX512_ONLY __attribute__((noinline)) auto with_avx512(const F& f) {
  return f();
}

template <class F>
FASTADV_INLINE auto at_simd_level(const F& f) {
#if FASTADV_HAS_SIMD_LEVELS
  if (kSimdLevel == SimdLevel::kAvx512) return with_avx512(f);
  if (kSimdLevel == SimdLevel::kAvx2) return with_avx2(f);
#endif
  return f();
}

// The same for a function that AVX-512 has a version of its own of: without code for it here.
template <class F>
FASTADV_INLINE auto below_avx512(const F& f) {
#if FASTADV_HAS_SIMD_LEVELS
  if (kSimdLevel != SimdLevel::kBaseline) return with_avx2(f);
#endif
  return f();
}

// A pointer to a function whose calls go through FASTADV_DISPATCH.
template <auto function>
struct Dispatched;
template <class... Args, void (*function)(Args...)>
struct Dispatched<function> {
  static void call(Args... args) { FASTADV_DISPATCH(function(args...)); }
};
template <auto function>
constexpr auto dispatched = &Dispatched<function>::call;

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
