// The inner loops of csrc/cpu/conv_depthwise.h, apart from torch's headers as those of
// conv3x3_avx512.cpp are.
#include "cpu/conv_depthwise.h"

#if defined(__x86_64__) && defined(__linux__)
#include <algorithm>

#include "cpu/conv_inner.h"

namespace fastadv::conv_depthwise {
namespace {

// 32 channels in float32. Even and odd ones are apart because a shift and a mask split them.
struct Pair {
  __m512 even, odd;
};

FASTADV_AVX512_INLINE Pair split(__m512i values) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(values, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(values, _mm512_set1_epi32(int(0xffff0000))))};
}

FASTADV_AVX512_INLINE Pair load(const uint16_t* from, __mmask32 live) {
  return split(_mm512_maskz_loadu_epi16(live, from));
}

FASTADV_AVX512_INLINE Pair load(const float* from) {
  return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
}

FASTADV_AVX512_INLINE void store(uint16_t* to, const Pair& values, __mmask32 live) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(values.odd, values.even);
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i mixed = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
  if (live == 0xffffffffu) {
    _mm512_storeu_si512(to, mixed);
  } else {
    _mm512_mask_storeu_epi16(to, live, mixed);
  }
}

FASTADV_AVX512_INLINE void finish(uint16_t* out, Pair value, const conv::Epilogue& epilogue,
                                  int64_t at, const float* bias, __mmask32 live) {
  const __m512 zero = _mm512_setzero_ps();
  if (bias) {
    const Pair b = load(bias);
    value = {_mm512_add_ps(value.even, b.even), _mm512_add_ps(value.odd, b.odd)};
  }
  if (epilogue.add) {
    const Pair a = load(epilogue.add + at, live);
    value = {_mm512_add_ps(value.even, a.even), _mm512_add_ps(value.odd, a.odd)};
  }
  // As in csrc/cpu/conv_inner.h, NaN stays.
  if (epilogue.relu) value = {_mm512_max_ps(zero, value.even), _mm512_max_ps(zero, value.odd)};
  if (epilogue.mask) {
    const Pair m = load(epilogue.mask + at, live);
    value = {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(m.even, zero, _CMP_GT_OQ), value.even),
             _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(m.odd, zero, _CMP_GT_OQ), value.odd)};
  }
  store(out + at, value, live);
}

// What a row of results has in common, for one block of channels.
struct Row {
  uint16_t* out;
  const uint16_t* x;  // the image, at the block
  const float* filters;
  const float* bias;  // of the block
  __mmask32 live;
  int64_t first_in;             // the input row under the first row of taps
  int64_t tap_begin, tap_end;   // the rows of taps inside the image
  int64_t result, result_step;  // where the row's results lie, at the block
};

// `places` results from column `j` on. An input is read once for all results of a row of taps.
template <int taps, int step, int places, bool checked>
FASTADV_AVX512 void run(const Row& row, const Shape& shape, const conv::Epilogue& epilogue,
                        int64_t j) {
  Pair sum[places];
#pragma GCC unroll 8
  for (int p = 0; p < places; ++p) sum[p] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const int64_t first = j * step + shape.first_column;
  for (int64_t r = row.tap_begin; r < row.tap_end; ++r) {
    const uint16_t* from = row.x + ((row.first_in + r) * shape.in_width + first) * shape.channels;
    const float* filters = row.filters + r * taps * kBlock;
    Pair filter[taps];
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) filter[t] = load(filters + t * kBlock);
#pragma GCC unroll 24
    for (int u = 0; u < (places - 1) * step + taps; ++u) {
      if (checked && (first + u < 0 || first + u >= shape.in_width)) continue;
      const Pair input = load(from + u * shape.channels, row.live);
#pragma GCC unroll 8
      for (int p = 0; p < places; ++p) {
        const int t = u - p * step;
        if (t < 0 || t >= taps) continue;
        sum[p].even = _mm512_fmadd_ps(input.even, filter[t].even, sum[p].even);
        sum[p].odd = _mm512_fmadd_ps(input.odd, filter[t].odd, sum[p].odd);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < places; ++p) {
    finish(row.out, sum[p], epilogue, row.result + (j + p) * row.result_step, row.bias, row.live);
  }
}

template <int taps, int step, int places>
void run_places(const Row& row, const Shape& shape, const conv::Epilogue& epilogue, int64_t j) {
  const int64_t first = j * step + shape.first_column;
  const bool inside = first >= 0 && first + (places - 1) * step + taps <= shape.in_width;
  if (inside) {
    run<taps, step, places, false>(row, shape, epilogue, j);
  } else {
    run<taps, step, places, true>(row, shape, epilogue, j);
  }
}

template <int taps, int step>
void run_row(const Row& row, const Shape& shape, const conv::Epilogue& epilogue) {
  const int64_t width = shape.grid_width();
  int64_t j = 0;
  for (; j + 7 <= width; j += 7) run_places<taps, step, 7>(row, shape, epilogue, j);
  for (; j + 4 <= width; j += 4) run_places<taps, step, 4>(row, shape, epilogue, j);
  for (; j + 2 <= width; j += 2) run_places<taps, step, 2>(row, shape, epilogue, j);
  for (; j < width; ++j) run_places<taps, step, 1>(row, shape, epilogue, j);
}

using RunRow = void (*)(const Row&, const Shape&, const conv::Epilogue&);

RunRow form_of(int64_t taps, int64_t step) {
  constexpr RunRow kPlain[] = {nullptr,       run_row<1, 1>, run_row<2, 1>, run_row<3, 1>,
                               run_row<4, 1>, run_row<5, 1>, nullptr,       run_row<7, 1>};
  constexpr RunRow kStrided[] = {nullptr, nullptr,       nullptr, run_row<3, 2>,
                                 nullptr, run_row<5, 2>, nullptr, run_row<7, 2>};
  if (taps < 0 || taps > 7) return nullptr;
  return step == 1 ? kPlain[taps] : step == 2 ? kStrided[taps] : nullptr;
}

}  // namespace

bool serves(int64_t tap_columns, int64_t in_step) {
  return conv::supported() && form_of(tap_columns, in_step) != nullptr;
}

void convolve(uint16_t* out, const uint16_t* x, const float* packed, const Shape& shape,
              const conv::Epilogue& epilogue, int64_t image, int64_t row) {
  const RunRow run = form_of(shape.tap_columns, shape.in_step);
  const int64_t first_in = row * shape.in_step + shape.first_row;
  const int64_t out_row = row * shape.out_step + shape.out_row;
  for (int64_t block = 0; block < shape.blocks(); ++block) {
    const int64_t channel = block * kBlock, live = std::min(kBlock, shape.channels - channel);
    const Row about{
        out,
        x + image * shape.in_height * shape.in_width * shape.channels + channel,
        packed + block * shape.tap_rows * shape.tap_columns * kBlock,
        epilogue.bias ? epilogue.bias + channel : nullptr,
        live == kBlock ? __mmask32(0xffffffffu) : __mmask32((1u << live) - 1),
        first_in,
        std::max<int64_t>(0, -first_in),
        std::min(shape.tap_rows, shape.in_height - first_in),
        ((image * shape.out_height + out_row) * shape.out_width + shape.out_column) *
                shape.channels +
            channel,
        shape.out_step * shape.channels,
    };
    run(about, shape, epilogue);
  }
}

}  // namespace fastadv::conv_depthwise

#else

namespace fastadv::conv_depthwise {

bool serves(int64_t, int64_t) { return false; }
void convolve(uint16_t*, const uint16_t*, const float*, const Shape&, const conv::Epilogue&,
              int64_t, int64_t) {}

}  // namespace fastadv::conv_depthwise

#endif
