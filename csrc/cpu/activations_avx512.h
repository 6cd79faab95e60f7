// The activations of csrc/cpu/rows.h and their slopes, for 16 lanes of AVX-512: approximations
// whose errors are far below the rounding of bfloat16.
#pragma once

#include "cpu/conv_inner.h"
#include "cpu/rows.h"

namespace fastadv::rows {
namespace {

using conv::constant;

// The polynomial with these coefficients, the lowest first, in each lane.
template <int count>
FASTADV_AVX512_INLINE __m512 polynomial(const float (&coefficients)[count], __m512 x) {
  __m512 sum = constant(coefficients[count - 1]);
#pragma GCC unroll 16
  for (int i = count - 2; i >= 0; --i) sum = _mm512_fmadd_ps(sum, x, constant(coefficients[i]));
  return sum;
}

// Maxima and minima return their second argument if one of the two is NaN.
FASTADV_AVX512_INLINE __m512 clamped(__m512 x, float low, float high) {
  return _mm512_max_ps(constant(low), _mm512_min_ps(constant(high), x));
}

// 2^x, its relative error below 1e-4: bfloat16 has 4e-3.
FASTADV_AVX512_INLINE __m512 power_of_two(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  constexpr float kPowers[] = {1.0f, 0.69314718f, 0.24022651f, 0.05550411f, 0.00961813f};
  return _mm512_scalef_ps(polynomial(kPowers, _mm512_sub_ps(x, n)), n);
}

constexpr float kLog2e = 1.44269504f;

// 1 / (1 + e^-x).
FASTADV_AVX512_INLINE __m512 sigmoid(__m512 x) {
  const __m512 e = power_of_two(_mm512_mul_ps(clamped(x, -87.0f, 87.0f), constant(-kLog2e)));
  return _mm512_rcp14_ps(_mm512_add_ps(constant(1.0f), e));
}

// 1/2 + x P(x^2) for x clamped to |x| <= 4.5. The argument of P is mapped to -1 .. 1.
template <int count>
FASTADV_AVX512_INLINE __m512 odd_about_half(const float (&coefficients)[count], __m512 x) {
  const __m512 inner = clamped(x, -4.5f, 4.5f);
  const __m512 square =
      _mm512_fmadd_ps(_mm512_mul_ps(inner, inner), constant(2 / (4.5f * 4.5f)), constant(-1.0f));
  return _mm512_fmadd_ps(inner, polynomial(coefficients, square), constant(0.5f));
}

// Phi(x) of the normal distribution, and Phi(x) + x Phi'(x), the slope of GELU. The coefficients
// minimise the largest error, which is 7e-6 and 8e-5.
constexpr float kNormal[] = {0.156906039f,   -0.0771858841f, 0.054637488f,   -0.0402369834f,
                             0.0288576595f,  -0.0184839498f, 0.00965320878f, -0.0060702255f,
                             0.00496271253f, -0.00193051912f};
constexpr float kGeluSlope[] = {0.159431547f,  -0.0900131986f, 0.0869873911f, -0.0939220116f,
                                0.0978996083f, -0.0938373581f, 0.0697615072f, -0.0362113416f,
                                0.0284604896f, -0.0293628797f, 0.0119351754f};

constexpr float kTanhScale = 2 * 0.7978845608f;  // 2 sqrt(2 / pi)
constexpr float kTanhCube = 0.044715f;

// clamp(x + 3, 0, 6) / 6.
FASTADV_AVX512_INLINE __m512 hard(__m512 x) {
  const __m512 up = _mm512_add_ps(x, constant(3.0f));
  const __m512 low = _mm512_max_ps(_mm512_setzero_ps(), up);  // the second is kept where it is NaN
  return _mm512_mul_ps(_mm512_min_ps(constant(6.0f), low), constant(1.0f / 6));
}

FASTADV_AVX512_INLINE __mmask16 between(__m512 x, float low, float high) {
  const __mmask16 above = _mm512_cmp_ps_mask(x, constant(low), _CMP_GT_OQ);
  return _mm512_mask_cmp_ps_mask(above, x, constant(high), _CMP_LT_OQ);
}

template <Activation kind>
FASTADV_AVX512_INLINE __m512 value_of(__m512 x) {
  if constexpr (kind == Activation::kGelu) {
    return _mm512_mul_ps(_mm512_max_ps(constant(-4.5f), x), odd_about_half(kNormal, x));
  } else if constexpr (kind == Activation::kGeluTanh) {
    const __m512 cube = _mm512_fmadd_ps(_mm512_mul_ps(x, x), constant(kTanhCube), constant(1.0f));
    return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(_mm512_mul_ps(x, constant(kTanhScale)), cube)));
  } else if constexpr (kind == Activation::kSilu) {
    return _mm512_mul_ps(x, sigmoid(x));
  } else if constexpr (kind == Activation::kHardswish) {
    return _mm512_mul_ps(x, hard(x));
  } else if constexpr (kind == Activation::kHardsigmoid) {
    return hard(x);
  } else if constexpr (kind == Activation::kSigmoid) {
    return sigmoid(x);
  } else {
    return _mm512_min_ps(constant(6.0f), _mm512_max_ps(_mm512_setzero_ps(), x));
  }
}

template <Activation kind>
FASTADV_AVX512_INLINE __m512 slope_of(__m512 x) {
  const __m512 one = constant(1.0f);
  if constexpr (kind == Activation::kGelu) {
    return odd_about_half(kGeluSlope, x);
  } else if constexpr (kind == Activation::kGeluTanh) {
    x = clamped(x, -30.0f, 30.0f);  // it is 0 or 1 there
    const __m512 square = _mm512_mul_ps(x, x);
    const __m512 cube = _mm512_fmadd_ps(square, constant(kTanhCube), one);
    const __m512 s = sigmoid(_mm512_mul_ps(_mm512_mul_ps(x, constant(kTanhScale)), cube));
    const __m512 steep =
        _mm512_mul_ps(constant(kTanhScale), _mm512_fmadd_ps(square, constant(3 * kTanhCube), one));
    const __m512 rise = _mm512_mul_ps(_mm512_mul_ps(s, _mm512_sub_ps(one, s)), steep);
    return _mm512_fmadd_ps(x, rise, s);
  } else if constexpr (kind == Activation::kSilu) {
    const __m512 s = sigmoid(x);
    return _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
  } else if constexpr (kind == Activation::kHardswish) {
    const __m512 middle = _mm512_fmadd_ps(x, constant(1.0f / 3), constant(0.5f));
    const __m512 outer =
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, constant(3.0f), _CMP_GE_OQ), one);
    const __mmask16 inner = between(x, -3.0f, 3.0f);
    return _mm512_mask_mov_ps(outer, inner, middle);
  } else if constexpr (kind == Activation::kHardsigmoid) {
    return _mm512_maskz_mov_ps(between(x, -3.0f, 3.0f), constant(1.0f / 6));
  } else if constexpr (kind == Activation::kSigmoid) {
    const __m512 s = sigmoid(x);
    return _mm512_mul_ps(s, _mm512_sub_ps(one, s));
  } else {
    return _mm512_maskz_mov_ps(between(x, 0.0f, 6.0f), one);
  }
}

}  // namespace
}  // namespace fastadv::rows
