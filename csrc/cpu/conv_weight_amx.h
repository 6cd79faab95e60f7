// The gradient of a convolution in its weights by AMX: the inner loops, without torch.
//
// The gradient of a filter's tap is a product of matrices, [K][places] times [places][C], over the
// places of all results. AMX multiplies tiles of 16 rows of 32 places by tiles of 16 pairs of
// places of 16 channels. So the gradients in the results are transposed, and the inputs laid out in
// pairs of places, once for every column of the filter; a tap one row down then reads the same
// pairs one row further on. Rows of zeros between the images keep the taps of one image off the
// next.
//
// The eight tiles, for one tap and 32 places:
//
//                                 inputs [16 pairs of places][16 channels][2]:
//                                       tile 6               tile 7
//                                       channels 0 .. 15     channels 16 .. 31
//   gradients [16 filters][32 places]:
//     tile 4, filters 0 .. 15     sums: tile 0               tile 1
//     tile 5, filters 16 .. 31          tile 2               tile 3
#pragma once

#include <cstdint>
#include <vector>

namespace fastadv::conv_weight {

constexpr int64_t kTileSide = 16;         // rows of a tile, and pairs of places in it
constexpr int64_t kPair = 2 * kTileSide;  // numbers of a row of a tile
constexpr int64_t kTile = 16 * kPair;     // numbers of a tile
// Channels of both kinds come in multiples of this: two tiles.
constexpr int64_t kChannels = 2 * kTileSide;

struct Shape {
  int64_t batch, in_channels, out_channels;
  int64_t in_height, in_width, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width, pad_height, pad_width, dilate_height, dilate_width;
};

// Inputs laid out for the taps of one column of the filter whose rows have the same remainder
// modulo the stride.
struct Group {
  // The row and column of the input that the first place of a result reads.
  int64_t remainder, column;
};

struct Tap {
  int64_t place;  // in the filter, by row and then by column
  int64_t group;
  int64_t row;  // from a place's row to the row that it reads, in rows of the group
};

// The taps of 32 filters and 32 input channels.
struct Part {
  int64_t filter, channel;  // the first
  int64_t first_tap, last_tap;
};

// How the images are laid out, in chunks that the caches hold.
struct Plan {
  explicit Plan(const Shape& shape);

  int64_t chunks() const { return (shape.batch + images - 1) / images; }
  int64_t gradient_elements() const { return shape.out_channels * steps * kPair; }
  int64_t input_elements() const {
    return int64_t(groups.size()) * shape.in_channels / kTileSide * block;
  }
  int64_t parts() const { return shape.out_channels * shape.in_channels / (kChannels * kChannels); }
  int64_t sum_elements() const { return int64_t(taps.size()) * kChannels * kChannels; }

  Shape shape;
  std::vector<Group> groups;
  std::vector<Tap> taps;        // by group
  int64_t first_row, last_row;  // of the taps
  int64_t row_pairs;            // pairs of places of a row of results
  int64_t image_rows;           // rows of results of an image, and those of zeros after it
  int64_t images;               // of a chunk
  int64_t steps;                // tiles of places of a chunk
  int64_t block;                // elements of 16 channels of the inputs of a group
};

// Lays out 32 places of the gradients [B, H, W, K] in the results: [K / 16][steps][16][32].
void pack_gradient(uint16_t* packed, const uint16_t* gradient, const Plan& plan, int64_t chunk,
                   int64_t step);

// Lays out row `row` of the inputs [B, H, W, C] of a chunk, of rows() in all: [groups][C /
// 16][rows][pairs][16][2].
int64_t input_rows(const Plan& plan);
void pack_input(uint16_t* packed, const uint16_t* x, const Plan& plan, int64_t chunk, int64_t row);

// Adds a chunk to the sums of a part, [taps][4 tiles]. The first chunk begins them, and the last
// one writes the gradient [K][taps][C] in the weights instead, so that one chunk alone needs no
// sums. Between conv_amx::configure() and conv_amx::release() on the same thread.
void multiply(float* out, float* sums, const uint16_t* gradient, const uint16_t* x,
              const Plan& plan, int64_t chunk, const Part& part);

}  // namespace fastadv::conv_weight
