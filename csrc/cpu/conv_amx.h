// The convolutions of csrc/cpu/conv_gather.h by AMX: the inner loops, without torch.
//
// AMX multiplies tiles of 16 rows of 64 bytes, which must lie at one distance from one another. A
// tile's rows are the same place of 16 images. So the inputs are first laid out with the images
// innermost, and a tap that falls outside the image is left out for all of them.
#pragma once

#include <cstdint>

#include "cpu/conv_gather.h"

namespace fastadv::conv_amx {

using conv_gather::Shape;

constexpr int64_t kDepth = 32;  // input channels of a tile; a convolution has multiples of it
constexpr int64_t kBlock = 32;  // output channels that are computed together: two tiles

// Whether this processor has AMX for bfloat16 and the operating system lets this process use it.
// The first call asks for that.
bool supported();

// How a convolution is cut into parts: some rows of results of some images.
struct Plan {
  Plan(const Shape& shape, int64_t threads);

  int64_t parts() const { return groups() * parts_per_group; }
  int64_t groups() const { return (shape.batch + images - 1) / images; }
  int64_t scratch_bytes() const;

  Shape shape;
  int64_t images;                 // of a part: 16 or 32
  int64_t rows, parts_per_group;  // of results of a part
  int64_t first_tap, tap_rows;    // the lowest row of a tap, and the rows of taps from there on
  int64_t pixel;                  // elements from an image to the next
};

// Filters [K, C, height * width] of a convolution, or, backward, of its gradient in the input.
struct Filters {
  const float* weight;                // [K][height * width][C]
  const float* scale;                 // per K; null = 1
  int64_t out_channels, in_channels;  // of the results and inputs: K and C, backward C and K
  int64_t size;                       // height * width
  bool backward;
  const int64_t* taps;  // places in height * width
  int64_t tap_count;
};

// Packs the filters of the 32 output channels from `out` on as [taps * in / 32][tiles of 16
// out][16][16 out][2]; output channels that do not exist are 0.
void pack(uint16_t* packed, const Filters& filters, int64_t out);

// Computes the results of a part. `packed` holds what `pack` made of all output channels, block by
// block.
void convolve(uint16_t* out, const uint16_t* x, const uint16_t* packed, const Plan& plan,
              const conv::Epilogue& epilogue, int64_t part, void* scratch);

}  // namespace fastadv::conv_amx
