// The sizes and the checks of arguments that the host sides of the gathering convolutions share.
#pragma once

#include "cpu/conv_gather.h"
#include "cpu/conv_tensor.h"

namespace fastadv::conv_gather {

// The inputs of a task's places take at most about half of a core's second-level cache.
inline int64_t places_per_task(const Shape& shape, int64_t element) {
  const int64_t bytes = std::max<int64_t>(shape.depth(), 1) * element;
  return conv::even_share(shape.places(), std::clamp<int64_t>((400 << 10) / bytes, 24, 192));
}

// The sizes of a convolution, its arguments checked; the result points into the arrays.
template <class Stored>
Shape shape_of(const at::Tensor& out, const at::Tensor& x, at::IntArrayRef tap_rows,
               at::IntArrayRef tap_columns, at::IntArrayRef steps, at::IntArrayRef origin) {
  TORCH_CHECK_VALUE(x.dim() == 4 && out.dim() == 4 && x.size(0) == out.size(0),
                    "x and out must have axes [B, C, H, W] and one B, got ", x.sizes(), " and ",
                    out.sizes());
  TORCH_CHECK_VALUE(tap_rows.size() == tap_columns.size(),
                    "tap_columns must be as many as tap_rows, ", tap_rows.size(), ", got ",
                    tap_columns.size());
  TORCH_CHECK_VALUE(steps.size() == 2 && steps[0] > 0 && steps[1] > 0,
                    "steps must be two positive numbers (input, output), got ", steps);
  TORCH_CHECK_VALUE(origin.size() == 2 && origin[0] >= 0 && origin[1] >= 0 &&
                        origin[0] <= out.size(2) && origin[1] <= out.size(3),
                    "origin must be a place (row, column) of out, got ", origin);
  conv::check_dense<Stored>(x, "x", x.sizes());
  conv::check_dense<Stored>(out, "out", out.sizes());
  return {x.size(0),       x.size(2),         x.size(3),   x.size(1),
          out.size(2),     out.size(3),       out.size(1), steps[0],
          steps[1],        origin[0],         origin[1],   int64_t(tap_rows.size()),
          tap_rows.data(), tap_columns.data()};
}

}  // namespace fastadv::conv_gather
