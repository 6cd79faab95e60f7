// Sums over one sample whose error hardly grows with the number of terms.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/simd.h"

namespace fastadv {

constexpr int kLanes = 32;  // partial sums, the same at every SIMD level: all give the same bits
constexpr int64_t kRun = 8 * kLanes;  // terms added in the dtype of computation, then in double

// N sums at once over the elements 0 .. n - 1; terms(i) is a std::array<C, N>. For use in functions
// called through FASTADV_DISPATCH. Float sums of many like terms would all round the same way and
// drift.
template <class C, size_t N, class F>
FASTADV_INLINE std::array<double, N> sums(int64_t n, const F& terms) {
  double total[N][kLanes] = {};
  const auto add_run = [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    C part[N][kLanes] = {};
    for (int64_t i = begin; i < begin + count; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const std::array<C, N> term = terms(i + l);
        for (size_t k = 0; k < N; ++k) part[k][l] += term[k];
      }
    }
    for (size_t k = 0; k < N; ++k) {
      for (int l = 0; l < kLanes; ++l) total[k][l] += part[k][l];
    }
  };
  const int64_t runs = n / kRun * kRun, whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < runs; i += kRun) add_run(i, kRun);
  add_run(runs, whole - runs);
  for (int64_t i = whole; i < n; ++i) {
    const std::array<C, N> term = terms(i);
    for (size_t k = 0; k < N; ++k) total[k][i - whole] += term[k];
  }
  std::array<double, N> result;
  for (size_t k = 0; k < N; ++k) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) total[k][l] += total[k][l + half];
    }
    result[k] = total[k][0];
  }
  return result;
}

// N sums of doubles at once over the elements 0 .. n - 1; terms(i) is a std::array<double, N>.
// Fewer lanes than above, so that three sums stay in the registers of AVX2.
template <size_t N, class F>
FASTADV_INLINE std::array<double, N> double_sums(int64_t n, const F& terms) {
  constexpr int kDoubles = 16;
  double total[N][kDoubles] = {};
  const int64_t whole = n / kDoubles * kDoubles;
  for (int64_t i = 0; i < whole; i += kDoubles) {
    for (int l = 0; l < kDoubles; ++l) {
      const std::array<double, N> term = terms(i + l);
      for (size_t k = 0; k < N; ++k) total[k][l] += term[k];
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    const std::array<double, N> term = terms(i);
    for (size_t k = 0; k < N; ++k) total[k][i - whole] += term[k];
  }
  std::array<double, N> result;
  for (size_t k = 0; k < N; ++k) {
    for (int half = kDoubles / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) total[k][l] += total[k][l + half];
    }
    result[k] = total[k][0];
  }
  return result;
}

}  // namespace fastadv
