// The convolutions of csrc/cpu/conv_gather.h by AMX: the inner loops, without torch.
//
// AMX multiplies tiles of 16 rows of 64 bytes, which must lie at one distance from one another. A
// tile's rows are neighbouring columns of a row of results, of as many images as fill the tile. So
// some images are first laid out together, place by place, with zeros beside their rows. Then every
// tap of a tile lies at one distance from the tile's first place, and all taps and filters read
// memory that the first two caches hold.
//
// Two images, p = place (column), n = image, each box the input channels of one place:
//
//   zeros   p0 n0 | p0 n1 | p1 n0 | p1 n1 | p2 n0 | p2 n1 | ...   zeros    row 0
//   zeros   p0 n0 | p0 n1 | p1 n0 | p1 n1 | p2 n0 | p2 n1 | ...   zeros    row 1
//           '------ 16 boxes: the rows of one tile -------'
//           the tap one column to the right: the same, 2 boxes on; one row down: one row on
//
// The eight tiles, for one tap and 32 input channels. A tile of inputs is [16 places][32 channels],
// one of filters [16 pairs of input channels][16 output channels][2]:
//
//                              filters: tile 6      tile 7
//                              16 output channels   the next 16
//   inputs: tile 4, 16 places   sums: tile 0         tile 1
//           tile 5, 16 places         tile 2         tile 3
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv_gather.h"

namespace fastadv::conv_amx {

using conv_gather::Shape;

constexpr int64_t kRows = 16;   // of a tile
constexpr int64_t kDepth = 32;  // input channels of a tile; a convolution has multiples of it
constexpr int64_t kBlock = 32;  // output channels that are computed together: two tiles

// Whether this processor has AMX for bfloat16 and the operating system lets this process use it.
// The first call asks for that.
bool supported();

// Give this thread eight tiles of 16 rows of 64 bytes, and give them back.
void configure();
void release();

// Where a tap reads, in elements from a tile's first place, and where its filters lie, in tiles.
struct Tap {
  int64_t input, filter;
};

// A row of tiles that is a result.
struct Row {
  int64_t sums;    // the row's, in numbers from the tiles' first
  int64_t result;  // where its first channel lies, in elements from the group's first result
};

// One or two tiles of results that have the same taps in the image.
struct Tiles {
  int64_t input, next;  // the first places of both, in elements from the group's first input
  bool pair;
  int64_t first_tap, taps;
  int64_t count;  // of results
  Row rows[2 * kRows];
};

// Some rows of the results of a group of images: [first, first + count) of `Plan::tiles`.
struct Strip {
  int64_t row, first, count;
};

// How images are laid out for tiles, and what it costs.
struct Layout {
  int64_t images;   // of a group: laid out together, place by place
  bool whole_rows;  // no tile has places of two rows; else a tile goes on in the next row
};

// How a convolution is cut into parts: some rows and channels of the results of some groups.
struct Plan {
  Plan(const Shape& shape, int64_t threads);
  Plan(const Shape& shape, int64_t threads, const Layout& layout);

  int64_t parts() const { return int64_t(strips.size()) * group_ranges * channel_ranges; }
  int64_t groups() const { return (shape.batch + layout.images - 1) / layout.images; }
  int64_t scratch_bytes() const;
  int64_t blocks() const { return (shape.out_channels + kBlock - 1) / kBlock; }
  int64_t place() const { return layout.images * pixel; }
  int64_t row() const { return shape.in_step * columns * place(); }

  Shape shape;
  Layout layout;
  bool direct;                  // the inputs are read where they lie
  int64_t results;              // elements of all results
  int64_t pixel;                // elements from an image's place to that of the next image
  int64_t left;                 // columns of zeros before a row
  int64_t columns;              // of a row with its zeros, for every remainder modulo the step
  int64_t after;                // columns of zeros after the last row
  int64_t first_tap, tap_rows;  // the lowest row of a tap, and the rows of taps from there on
  int64_t rows;                 // of results of a strip, at most
  int64_t group_elements;       // of the inputs of a group and strip
  int64_t groups_per_range, group_ranges;
  int64_t blocks_per_range, channel_ranges;
  bool tiles_first;  // all channels of some tiles, and then of the next; else the reverse
  std::vector<Tap> taps;
  std::vector<Tiles> tiles;
  std::vector<Strip> strips;

 private:
  void place_inputs();
  void find_tiles();
  void share_out(int64_t threads);
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

// Packs the filters of the 32 output channels from `out` on as [in / 32][taps][tiles of 16
// out][16][16 out][2]; output channels that do not exist are 0.
void pack(uint16_t* packed, const Filters& filters, int64_t out);

// Computes the results of a part. `packed` holds what `pack` made of all output channels, block by
// block.
void convolve(uint16_t* out, const uint16_t* x, const uint16_t* packed, const Plan& plan,
              const conv::Epilogue& epilogue, int64_t part, void* scratch);

}  // namespace fastadv::conv_amx
