// Vectors of floats or doubles and their arithmetic, written once for all SIMD levels, because the
// compiler's own vectorisation gives up on the loops that use them. Vectors of 32 bytes are carried
// out in the registers of each SIMD level. Those of 64 are for AVX-512 alone, as the compiler takes
// them apart badly elsewhere. All of it is inlined into calls of FASTADV_DISPATCH or functions
// marked FASTADV_AVX512_ONLY.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace fastadv {

template <class C, int kBytes>
struct VectorOf {
  typedef C type __attribute__((vector_size(kBytes)));
};
template <class C, int kBytes>
using Vector = typename VectorOf<C, kBytes>::type;

template <class V>
using Element = std::remove_cvref_t<decltype(V{}[0])>;
template <class V>
constexpr int kLanesOf = int(sizeof(V) / sizeof(Element<V>));

template <class V>
FASTADV_INLINE V lanes_at(const Element<V>* from) {
  V to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

template <class V>
FASTADV_INLINE void set_lanes(Element<V>* to, V from) {
  std::memcpy(to, &from, sizeof(from));
}

// A constant in all lanes that the compiler does not see through: GCC finds a maximum, one
// instruction, in `larger` only where both sides are variables.
template <class V>
FASTADV_INLINE V hidden_constant(Element<V> value) {
#ifdef __SSE2__
  asm("" : "+x"(value));
#endif
  return V{} + value;
}

// The larger one; b where either is NaN.
template <class V>
FASTADV_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// e^x for x <= 0, within 2 units in the last place of a normal number; 0 below -87.7. NaN stays.
template <class V>
FASTADV_INLINE V exp_of_negative(V x) {
  if constexpr (std::is_same_v<Element<V>, double>) {
    for (int l = 0; l < kLanesOf<V>; ++l) x[l] = std::exp(x[l]);
    return x;
  } else {
    using Bits = Vector<uint32_t, sizeof(V)>;
    constexpr float kVanishing = -88.f, kLog2E = 1.44269504f;
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    // Adding 1.5 * 2^23 rounds to an integer n, which is then in the lowest bits. With 127 more
    // these are the exponent of 2^n; all are 0 for n = -127.
    constexpr float kRound = 12582912.f + 127;
    const V bounded = larger(hidden_constant<V>(kVanishing), x);
    const V rounded = bounded * kLog2E + kRound;
    const V n = rounded - kRound;
    const V r = (bounded - n * kLn2High) - n * kLn2Low;  // n * kLn2High is exact
    // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, fitted to a relative error of e^r of 3e-9
    const V high = (r * .00138145394f + .00836874545f) * r + .0416683890f;
    const V bent = (high * r + .166665211f) * r + .49999994f;
    const V e_to_r = (bent * r + 1.f) * r + 1.f;
    return e_to_r * (V)((Bits)rounded << 23);
  }
}

}  // namespace fastadv
