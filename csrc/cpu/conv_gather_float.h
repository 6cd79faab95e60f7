// Convolutions of any stride and kernel in float32, for processors with AVX-512 and with AVX2: the
// inner loops, without torch. As csrc/cpu/conv_gather.h, where places and taps are explained.
#pragma once

#include "cpu/conv_gather.h"

namespace fastadv::conv_gather {

using FloatEpilogue = conv::EpilogueOf<float>;

// Scratch memory of one task: its places, an input of zeros, and sums of 64 output channels.
inline int64_t float_scratch_bytes(const Shape& shape, int64_t places) {
  return places *
             int64_t(sizeof(int64_t) + shape.taps * sizeof(float*) + conv::kWide * sizeof(float)) +
         shape.in_channels * int64_t(sizeof(float));
}

// The same for each kind of vector.
struct FloatKernel {
  int lanes;  // 0 where it was not compiled
  // Computes the grid places [first, first + count) of all images. Filters are packed as [blocks of
  // 4 * 16 (AVX2: 2 * 8) out][depth][out of the block], out padded to 16. The last block may be
  // narrower.
  void (*convolve)(float* out, const float* x, const float* packed, const Shape& shape,
                   const FloatEpilogue& epilogue, int64_t first, int64_t count, void* scratch);
};

// Code whose instructions this processor may lack.
extern const FloatKernel kFloatAvx512, kFloatAvx2;

}  // namespace fastadv::conv_gather
