// The sizes and the checks of arguments that the host sides of the gathering convolutions share.
#pragma once

#include <c10/util/SmallVector.h>

#include <limits>

#include "cpu/conv_gather.h"
#include "cpu/conv_tensor.h"

namespace fastadv::conv_gather {

// One grid of results, and where its filters begin among those of all grids.
struct Grid {
  Shape shape;
  int64_t filters;
};
using Grids = c10::SmallVector<Grid, 4>;

// The grids of a convolution that have places, its arguments checked; they point into the arrays.
// padded(shape) is the number of output channels as the filters of a grid are packed.
template <class Stored, class Padded>
Grids grids_of(const at::Tensor& out, const at::Tensor& x, const at::Tensor& packed,
               at::IntArrayRef tap_rows, at::IntArrayRef tap_columns, at::IntArrayRef taps,
               at::IntArrayRef origins, at::IntArrayRef steps, const Padded& padded) {
  TORCH_CHECK_VALUE(x.dim() == 4 && out.dim() == 4 && x.size(0) == out.size(0),
                    "x and out must have axes [B, C, H, W] and one B, got ", x.sizes(), " and ",
                    out.sizes());
  TORCH_CHECK_VALUE(tap_rows.size() == tap_columns.size(),
                    "tap_columns must be as many as tap_rows, ", tap_rows.size(), ", got ",
                    tap_columns.size());
  TORCH_CHECK_VALUE(steps.size() == 2 && steps[0] > 0 && steps[1] > 0,
                    "steps must be two positive numbers (input, output), got ", steps);
  TORCH_CHECK_VALUE(origins.size() == 2 * taps.size(),
                    "origins must be a row and a column for each of the ", taps.size(),
                    " grids, got ", origins);
  conv::check_dense<Stored>(x, "x", x.sizes());
  conv::check_dense<Stored>(out, "out", out.sizes());
  Grids grids;
  int64_t first = 0, elements = 0;
  for (size_t g = 0; g < taps.size(); ++g) {
    const int64_t row = origins[2 * g], column = origins[2 * g + 1], count = taps[g];
    TORCH_CHECK_VALUE(count >= 0 && count <= int64_t(tap_rows.size()) - first,
                      "taps must divide the ", tap_rows.size(), " tap_rows, got ", taps);
    TORCH_CHECK_VALUE(row >= 0 && column >= 0, "origins must be at least 0, got ", origins);
    const Shape shape{x.size(0),
                      x.size(2),
                      x.size(3),
                      x.size(1),
                      out.size(2),
                      out.size(3),
                      out.size(1),
                      steps[0],
                      steps[1],
                      row,
                      column,
                      count,
                      tap_rows.data() + first,
                      tap_columns.data() + first};
    if (row < out.size(2) && column < out.size(3) && x.size(0) > 0) {
      grids.push_back({shape, elements});
    }
    first += count;
    elements += padded(shape) * shape.depth();
  }
  TORCH_CHECK_VALUE(first == int64_t(tap_rows.size()), "taps must divide the ", tap_rows.size(),
                    " tap_rows, got ", taps);
  conv::check_packed<Stored>(packed, elements);
  return grids;
}

// Runs f(grid, first, count, scratch) over all places of all grids, in parallel. Each thread takes
// the same share of every grid. The inputs of a task's places take at most about half of a core's
// second-level cache.
template <class Bytes, class F>
void for_places(const Grids& grids, int64_t element, const Bytes& scratch_bytes, const F& f) {
  int64_t products = 0, parts = std::numeric_limits<int64_t>::max();
  for (const Grid& grid : grids) {
    const Shape& shape = grid.shape;
    products += shape.places() * shape.depth() * shape.out_channels;
  }
  const int64_t threads = conv::useful_threads(products);
  c10::SmallVector<int64_t, 4> shares, tasks;
  for (const Grid& grid : grids) {
    const int64_t bytes = std::max<int64_t>(grid.shape.depth(), 1) * element;
    const int64_t total = grid.shape.places();
    const int64_t wanted = std::clamp<int64_t>((400 << 10) / bytes, 24, 192);
    shares.push_back(conv::even_share(total, wanted, threads));
    tasks.push_back((total + shares.back() - 1) / shares.back());
    parts = std::min(parts, tasks.back());
  }
  if (grids.empty()) return;
  // A part has tasks of every grid that are near each other, and read and write the same memory.
  at::parallel_for(0, parts, (parts + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (size_t g = 0; g < grids.size(); ++g) {
        const int64_t last = tasks[g] * (part + 1) / parts;
        for (int64_t task = tasks[g] * part / parts; task < last; ++task) {
          const int64_t first = task * shares[g];
          const int64_t count = std::min(shares[g], grids[g].shape.places() - first);
          f(grids[g], first, count, thread_scratch(scratch_bytes(grids[g].shape, count)));
        }
      }
    }
  });
}

}  // namespace fastadv::conv_gather
