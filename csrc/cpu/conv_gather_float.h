// Convolutions of any stride and kernel in float32, for processors with AVX-512 and with AVX2: the
// inner loops, without torch. As csrc/cpu/conv_gather.h, where places and taps are explained.
#pragma once

#include "cpu/conv_gather.h"

namespace fastadv::conv_gather {

using FloatEpilogue = conv::EpilogueOf<float>;

constexpr int64_t kFew = 4;  // channels, as images have them

inline bool has_few_results(const Shape& shape) { return shape.out_channels <= kFew; }

inline bool has_few_inputs(const Shape& shape) {
  return shape.in_channels <= kFew && !has_few_results(shape);
}

// How far from a place its taps read, along one axis.
struct Reach {
  int64_t first, length;
};

inline Reach reach(const int64_t* taps, int64_t count) {
  int64_t low = 0, high = -1;
  for (int64_t t = 0; t < count; ++t) {
    if (t == 0 || taps[t] < low) low = taps[t];
    if (t == 0 || taps[t] > high) high = taps[t];
  }
  return {low, high - low + 1};
}

// Pixels of the inputs that a row of the grid reads, side by side.
inline int64_t padded_width(const Shape& shape) {
  return (shape.grid_width() - 1) * shape.in_step + reach(shape.tap_columns, shape.taps).length;
}

// Lines of the inputs that neighbouring rows of the grid read.
inline int64_t padded_height(const Shape& shape, int64_t rows) {
  return (rows - 1) * shape.in_step + reach(shape.tap_rows, shape.taps).length;
}

// Scratch memory of one task. For few channels: where the taps read, and the pixels that its rows
// of one image read, or pointers to them and an input of zeros. Else its places, an input of zeros,
// and sums of 64 output channels.
inline int64_t float_scratch_bytes(const Shape& shape, int64_t places) {
  const int64_t input = shape.in_channels * int64_t(sizeof(float));
  if (has_few_inputs(shape) || has_few_results(shape)) {
    const bool points = has_few_results(shape);
    const int64_t width = shape.grid_width(), height = shape.grid_height();
    const int64_t rows = (places + width - 2) / width + 1;  // it may begin anywhere in a row
    const int64_t lines = padded_height(shape, rows < height ? rows : height);
    return shape.taps * int64_t(sizeof(int64_t)) +
           lines * padded_width(shape) * (points ? int64_t(sizeof(float*)) : input) +
           (points ? (input + 7) / 8 * 8 : 0);
  }
  return places *
             int64_t(sizeof(int64_t) + shape.taps * sizeof(float*) + conv::kWide * sizeof(float)) +
         input;
}

// Output channels as the filters are packed.
inline int64_t packed_channels(const Shape& shape) {
  return has_few_results(shape) ? shape.out_channels : conv::padded(shape.out_channels);
}

// Computes the grid places [first, first + count) of all images. Filters are packed as [blocks of
// 4 * 16 (AVX2: 2 * 8) out][depth][out of the block], out padded to 16. The last block may be
// narrower. For few results they are packed as [out][depth].
using FloatConvolve = void (*)(float* out, const float* x, const float* packed, const Shape& shape,
                               const FloatEpilogue& epilogue, int64_t first, int64_t count,
                               void* scratch);

// The same for each kind of vector.
struct FloatKernel {
  int lanes;  // 0 where it was not compiled
  // For any channels, for few of the inputs, and for few of the results.
  FloatConvolve convolve, from_few, to_few;

  FloatConvolve of(const Shape& shape) const {
    if (has_few_results(shape)) return to_few;
    return has_few_inputs(shape) ? from_few : convolve;
  }
};

// Code whose instructions this processor may lack.
extern const FloatKernel kFloatAvx512, kFloatAvx2;

}  // namespace fastadv::conv_gather
