// Winograd F(4x4, 3x3) convolution in bfloat16 for processors with AVX512-BF16: the inner loops,
// without torch.
//
// A 3x3 convolution of stride 1 and padding 1 is done on tiles of 4x4 results (Lavin and Gray
// 2016): each tile's 6x6 inputs are transformed, 36 small matrix products over the channels follow,
// and their results are transformed back. That is 36 multiplications where the direct sum does 144.
// Transforms run in float32; inputs of the products are rounded to bfloat16 and summed in float32.
#pragma once

#include <cstdint>

#include "cpu/conv_epilogue.h"

namespace fastadv::conv3x3 {

constexpr int kPoints = 36;  // products per tile: 6 x 6
constexpr int kTile = 4;     // results of a tile in each direction

using conv::Epilogue;
using conv::kVector;
using conv::kWide;

// Sizes of one convolution; images are dense channels-last bfloat16 [B, H, W, channels].
struct Shape {
  int64_t batch, height, width, in_channels, out_channels;

  int64_t tiles_down() const { return (height + kTile - 1) / kTile; }
  int64_t tiles_across() const { return (width + kTile - 1) / kTile; }
  int64_t tiles() const { return batch * tiles_down() * tiles_across(); }
  int64_t products() const { return tiles() * kPoints * in_channels * out_channels; }
};

// Scratch memory of one task.
int64_t scratch_bytes(const Shape& shape, int64_t tiles);

// Transforms the filters of 16 output channels from `out` on and all input channels. weight(o, i)
// points at 3x3 floats. The result is [36][blocks of 64 out][in / 2][64][2], out padded to vectors.
struct Filters {
  const float* weight;
  int64_t out_stride, in_stride, tap_stride;  // in floats
  bool rotated;                               // turned by 180 degrees, for the gradient
  const float* scale;   // per output channel of the forward convolution; null = 1
  bool scale_by_input;  // the forward's output channels are this one's input channels
  int64_t in_channels, out_channels;
};
void transform_filters(uint16_t* packed, const Filters& filters, int64_t out);

// Computes the tiles [first, first + count) of all images.
void convolve(uint16_t* out, const uint16_t* x, const uint16_t* packed, const Shape& shape,
              const Epilogue& epilogue, int64_t first, int64_t count, void* scratch);

}  // namespace fastadv::conv3x3
