// Where the results of a gathering convolution lie and which inputs they read, for any storage
// type. Without torch.
#pragma once

#include "cpu/conv_gather.h"

namespace fastadv::conv_gather {
namespace {

// Neighbouring places in a row of the grid of one image.
struct RowPart {
  int64_t image, row, column;  // of the grid
  int64_t result;              // where the first result lies in the output
  int64_t count;
};

// Calls f for the parts of rows that the places [first, first + count) make.
template <class F>
inline void for_row_parts(const Shape& shape, int64_t first, int64_t count, const F& f) {
  const int64_t width = shape.grid_width(), height = shape.grid_height();
  int64_t image = first / (width * height), i = first / width % height, j = first % width;
  while (count > 0) {
    const int64_t now = count < width - j ? count : width - j;
    const int64_t row = i * shape.out_step + shape.out_row;
    const int64_t column = j * shape.out_step + shape.out_column;
    const int64_t pixel = (image * shape.out_height + row) * shape.out_width + column;
    f(RowPart{image, i, j, pixel * shape.out_channels, now});
    count -= now;
    j = 0;
    i = i + 1 == height ? 0 : i + 1;
    image += i == 0;
  }
}

// Where a place's results lie in the output and where its inputs begin, tap by tap.
template <class Stored>
struct Places {
  int64_t count;
  int64_t* results;        // [count]
  const Stored** sources;  // [taps][count]

  // The inputs of a place and those behind it under tap t.
  const Stored* const* under(int64_t t, int64_t place) const { return sources + t * count + place; }
};

// Finds the places from `first` on. Taps outside the image read `zeros`.
template <class Stored>
void find_places(const Places<Stored>& places, const Stored* zeros, const Stored* x,
                 const Shape& shape, int64_t first) {
  const int64_t channels = shape.in_channels, width = shape.in_width;
  int64_t place = 0;
  for_row_parts(shape, first, places.count, [&](const RowPart& part) {
    for (int64_t p = 0; p < part.count; ++p) {
      places.results[place + p] = part.result + p * shape.out_step * shape.out_channels;
    }
    for (int64_t t = 0; t < shape.taps; ++t) {
      const Stored** to = places.sources + t * places.count + place;
      const int64_t row = part.row * shape.in_step + shape.tap_rows[t];
      const bool inside = row >= 0 && row < shape.in_height;
      const Stored* line = x + (part.image * shape.in_height + row) * width * channels;
      int64_t column = part.column * shape.in_step + shape.tap_columns[t];
      for (int64_t p = 0; p < part.count; ++p, column += shape.in_step) {
        to[p] = inside && column >= 0 && column < width ? line + column * channels : zeros;
      }
    }
    place += part.count;
  });
}

}  // namespace
}  // namespace fastadv::conv_gather
