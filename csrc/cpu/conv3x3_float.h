// Winograd F(4x4, 3x3) convolution in float32, for processors with AVX-512 and with AVX2: the inner
// loops, without torch. As csrc/cpu/conv3x3.h, where the sizes are explained.
#pragma once

#include "cpu/conv3x3.h"

namespace fastadv::conv3x3 {

using FloatEpilogue = conv::EpilogueOf<float>;

// The same for each kind of vector.
struct FloatKernel {
  int lanes;  // input channels come in multiples of them
  // Output channels are multiplied in blocks of as many. Filters are packed as [36][blocks of wide
  // out][in][wide], out padded to 16; the last block may be narrower.
  int wide;
  // Transforms the filters of 16 output channels from `out` on and all input channels.
  void (*transform_filters)(float* packed, const Filters& filters, int64_t out);
  // Computes the tiles [first, first + count) of all images.
  void (*convolve)(float* out, const float* x, const float* packed, const Shape& shape,
                   const FloatEpilogue& epilogue, int64_t first, int64_t count, void* scratch);
};

// Code that this processor may lack the instructions for; lanes is 0 where it was not compiled.
extern const FloatKernel kFloatAvx512, kFloatAvx2;

}  // namespace fastadv::conv3x3
