// Convolutions of any stride and kernel in bfloat16 for processors with AVX512-BF16: the inner
// loops, without torch.
//
// Results are computed on a grid. Each is a product of the inputs under its taps, read
// where they lie, with the filters.
// The gradient in the input of a convolution with stride s is s * s such grids: input positions
// whose remainders modulo s agree see the same taps.
#pragma once

#include <cstdint>

#include "cpu/conv_epilogue.h"

namespace fastadv::conv_gather {

// Images are dense channels-last bfloat16 [B, H, W, C]. Grid place (i, j) is the result (i *
// out_step + out_row, j * out_step + out_column); its tap t reads the input (i * in_step +
// tap_rows[t], j * in_step + tap_columns[t]), 0 outside the image.
struct Shape {
  int64_t batch, in_height, in_width, in_channels, out_height, out_width, out_channels;
  int64_t in_step, out_step, out_row, out_column;
  int64_t taps;
  const int64_t *tap_rows, *tap_columns;

  int64_t depth() const { return taps * in_channels; }
  int64_t grid_height() const { return (out_height - out_row + out_step - 1) / out_step; }
  int64_t grid_width() const { return (out_width - out_column + out_step - 1) / out_step; }
  int64_t places() const { return batch * grid_height() * grid_width(); }
};

// Scratch memory of one task.
int64_t scratch_bytes(const Shape& shape, int64_t places);

// Computes the grid places [first, first + count) of all images. Filters are packed as [blocks of
// 64 out][depth / 2][64][2], out padded to whole vectors.
void convolve(uint16_t* out, const uint16_t* x, const uint16_t* packed, const Shape& shape,
              const conv::Epilogue& epilogue, int64_t first, int64_t count, void* scratch);

}  // namespace fastadv::conv_gather
