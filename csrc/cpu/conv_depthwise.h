// Depthwise convolutions in bfloat16 for processors with AVX512-BF16: the inner loops, without
// torch.
//
// Results are computed on a grid, as in csrc/cpu/conv_gather.h, so that the gradient in the input
// of a strided convolution is a few such convolutions. A grid's taps are a block of neighbours.
#pragma once

#include <cstdint>

#include "cpu/conv_epilogue.h"

namespace fastadv::conv_depthwise {

constexpr int64_t kBlock = 32;  // channels that are computed together

// Images are dense channels-last bfloat16 [B, H, W, C]. Grid place (i, j) is the result (i *
// out_step + out_row, j * out_step + out_column); its tap (r, c) reads the input (i * in_step +
// first_row + r, j * in_step + first_column + c), 0 outside the image.
struct Shape {
  int64_t batch, channels, in_height, in_width, out_height, out_width;
  int64_t in_step, out_step, out_row, out_column;
  int64_t first_row, first_column, tap_rows, tap_columns;

  int64_t grid_height() const { return (out_height - out_row + out_step - 1) / out_step; }
  int64_t grid_width() const { return (out_width - out_column + out_step - 1) / out_step; }
  int64_t blocks() const { return (channels + kBlock - 1) / kBlock; }
};

// Whether `convolve` has a form for these taps.
bool serves(int64_t tap_columns, int64_t in_step);

// Computes one row of the grid of one image. Filters are packed as [blocks of 32
// channels][tap_rows][tap_columns][2][16], the even channels of a block before the odd ones, and
// the epilogue's bias as [blocks][2][16].
void convolve(uint16_t* out, const uint16_t* x, const float* packed, const Shape& shape,
              const conv::Epilogue& epilogue, int64_t image, int64_t row);

}  // namespace fastadv::conv_depthwise
