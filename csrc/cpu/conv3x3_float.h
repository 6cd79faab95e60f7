// Winograd F(4x4, 3x3) convolution in float32, for processors with AVX-512 and with AVX2: the inner
// loops, without torch. As csrc/cpu/conv3x3.h, where the sizes are explained.
#pragma once

#include "cpu/conv3x3.h"

namespace fastadv::conv3x3 {

using FloatEpilogue = conv::EpilogueOf<float>;

// Output channels whose products of one task are kept together. The transformed inputs are read
// once for all of them.
constexpr int64_t kFloatSpan = 256;

// The same for each kind of vector.
struct FloatKernel {
  int lanes;  // input channels come in multiples of them
  // Transforms the filters of 16 output channels from `out` on and all input channels. They are
  // packed as [36][blocks of 64 out][in][64], for AVX2 in blocks of 16, out padded to 16. The last
  // block may be narrower.
  void (*transform_filters)(float* packed, const Filters& filters, int64_t out);
  // Computes the tiles [first, first + count) of all images.
  void (*convolve)(float* out, const float* x, const float* packed, const Shape& shape,
                   const FloatEpilogue& epilogue, int64_t first, int64_t count, void* scratch);
};

// Code whose instructions this processor may lack; `lanes` is 0 if it was not compiled.
extern const FloatKernel kFloatAvx512, kFloatAvx2;

}  // namespace fastadv::conv3x3
