// Where the results of a gathering convolution lie and which inputs they read, for any storage
// type. Without torch.
#pragma once

#include "cpu/conv_gather.h"

namespace fastadv::conv_gather {
namespace {

// Where a place's results lie in the output and where its inputs begin, tap by tap.
template <class Stored>
struct Places {
  int64_t* results;        // [places]
  const Stored** sources;  // [places][taps]
};

// The input under tap t of the place (i, j) of an image, or null outside the image.
template <class Stored>
inline const Stored* input_at(const Stored* image, const Shape& shape, int64_t i, int64_t j,
                              int64_t t) {
  const int64_t row = i * shape.in_step + shape.tap_rows[t];
  const int64_t column = j * shape.in_step + shape.tap_columns[t];
  const bool inside = row >= 0 && row < shape.in_height && column >= 0 && column < shape.in_width;
  return inside ? image + (row * shape.in_width + column) * shape.in_channels : nullptr;
}

// Finds the places [first, first + count). Taps outside the image read `zeros`.
template <class Stored>
void find_places(const Places<Stored>& places, const Stored* zeros, const Stored* x,
                 const Shape& shape, int64_t first, int64_t count) {
  const int64_t width = shape.grid_width(), height = shape.grid_height();
  int64_t image = first / (width * height), i = first / width % height, j = first % width;
  for (int64_t p = 0; p < count; ++p) {
    const Stored* from = x + image * shape.in_height * shape.in_width * shape.in_channels;
    const Stored** sources = places.sources + p * shape.taps;
    for (int64_t t = 0; t < shape.taps; ++t) {
      const Stored* input = input_at(from, shape, i, j, t);
      sources[t] = input ? input : zeros;
    }
    const int64_t row = i * shape.out_step + shape.out_row;
    const int64_t column = j * shape.out_step + shape.out_column;
    places.results[p] =
        ((image * shape.out_height + row) * shape.out_width + column) * shape.out_channels;
    if (++j == width) {
      j = 0;
      i = i + 1 == height ? 0 : i + 1;
      image += i == 0;
    }
  }
}

}  // namespace
}  // namespace fastadv::conv_gather
