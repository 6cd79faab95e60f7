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

// Floats of a line of the inputs that `places` neighbouring places read.
inline int64_t padded_line(const Shape& shape, int64_t places) {
  const int64_t columns = reach(shape.tap_columns, shape.taps).length;
  return ((places - 1) * shape.in_step + columns) * shape.in_channels;
}

// Scratch memory of one task. For few inputs: where the taps read, and the lines of inputs of a row
// of the grid. Else its places, an input of zeros, and sums of 64 output channels.
inline int64_t float_scratch_bytes(const Shape& shape, int64_t places) {
  if (has_few_inputs(shape)) {
    const int64_t lines = reach(shape.tap_rows, shape.taps).length;
    return shape.taps * int64_t(sizeof(int64_t)) +
           lines * padded_line(shape, shape.grid_width()) * int64_t(sizeof(float));
  }
  return places *
             int64_t(sizeof(int64_t) + shape.taps * sizeof(float*) + conv::kWide * sizeof(float)) +
         shape.in_channels * int64_t(sizeof(float));
}

// Elements of the packed filters.
inline int64_t packed_floats(const Shape& shape) {
  return (has_few_results(shape) ? shape.out_channels : conv::padded(shape.out_channels)) *
         shape.depth();
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
