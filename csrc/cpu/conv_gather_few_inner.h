// The loops of csrc/cpu/conv_gather_float.h for images of few channels, as a network's first layer
// has them: few input channels, or few output channels in the gradient. Vectors of output channels
// would be mostly empty in the gradient, so that input channels fill them. The places of a row are
// found as they come: a table of them would cost more than the products. The includer does what
// csrc/cpu/conv_gather_float_inner.h wants, and also defines kSums.
#pragma once

#include "cpu/conv_gather_float_inner.h"

namespace fastadv::conv_gather {
namespace {

using namespace vec;

// Neighbouring places in a row of the grid.
struct RowPart {
  const float* image;   // the input
  int64_t row, column;  // of the grid
  int64_t result;       // where the first result lies in the output
  int64_t count;
};

// Calls f for the parts of rows that the places [first, first + count) make.
template <class F>
inline void for_row_parts(const float* x, const Shape& shape, int64_t first, int64_t count,
                          const F& f) {
  const int64_t width = shape.grid_width(), height = shape.grid_height();
  const int64_t image_size = shape.in_height * shape.in_width * shape.in_channels;
  while (count > 0) {
    const int64_t image = first / (width * height), i = first / width % height, j = first % width;
    const int64_t now = count < width - j ? count : width - j;
    const int64_t row = i * shape.out_step + shape.out_row;
    const int64_t column = j * shape.out_step + shape.out_column;
    const int64_t pixel = (image * shape.out_height + row) * shape.out_width + column;
    f(RowPart{x + image * image_size, i, j, pixel * shape.out_channels, now});
    first += now;
    count -= now;
  }
}

// The inputs of `places` places of a row from `j` on under tap t; false where their row lies
// outside the image.
template <int places>
FASTADV_LEVEL_INLINE bool find_inputs(const float* (&from)[places], const Shape& shape,
                                      const RowPart& part, int64_t j, int64_t t,
                                      const float* zeros) {
  const int64_t row = part.row * shape.in_step + shape.tap_rows[t];
  if (row < 0 || row >= shape.in_height) return false;
  const int64_t column = j * shape.in_step + shape.tap_columns[t];
  const int64_t last = column + (places - 1) * shape.in_step;
  const float* line = part.image + row * shape.in_width * shape.in_channels;
  if (column >= 0 && last < shape.in_width) {
    const float* input = line + column * shape.in_channels;
#pragma GCC unroll 8
    for (int p = 0; p < places; ++p) from[p] = input + p * shape.in_step * shape.in_channels;
    return true;
  }
#pragma GCC unroll 8
  for (int p = 0; p < places; ++p) {
    const int64_t at = column + p * shape.in_step;
    from[p] = at >= 0 && at < shape.in_width ? line + at * shape.in_channels : zeros;
  }
  return true;
}

// What the places of a task have in common.
struct FewTask {
  float* out;
  const float* packed;
  const float* zeros;  // as many as input channels
  const Shape& shape;
  const FloatEpilogue& epilogue;

  int64_t apart() const { return shape.out_step * shape.out_channels; }  // neighbours' results
};

// The inputs of a part of a row of the grid, copied with the zeros around them, and where each tap
// finds its inputs there.
class PaddedInputs {
 public:
  PaddedInputs(float* memory, int64_t* offsets, const Shape& shape)
      : memory_(memory),
        offsets_(offsets),
        shape_(shape),
        rows_(reach(shape.tap_rows, shape.taps)),
        columns_(reach(shape.tap_columns, shape.taps)) {}

  void copy(const RowPart& part) {
    const int64_t channels = shape_.in_channels, line = padded_line(shape_, part.count);
    for (int64_t t = 0; t < shape_.taps && part.count != count_; ++t) {
      offsets_[t] = (shape_.tap_rows[t] - rows_.first) * line +
                    (shape_.tap_columns[t] - columns_.first) * channels;
    }
    count_ = part.count;
    const int64_t first = part.column * shape_.in_step + columns_.first;
    const int64_t width = line / channels, height = shape_.in_height;
    const int64_t before = within(-first, width), behind = within(shape_.in_width - first, width);
    for (int64_t r = 0; r < rows_.length; ++r) {
      const int64_t row = part.row * shape_.in_step + rows_.first + r;
      float* to = memory_ + r * line;
      if (row < 0 || row >= height || before >= behind) {
        fill(to, 0, line);
        continue;
      }
      const float* from = part.image + (row * shape_.in_width + first) * channels;
      fill(to, 0, before * channels);
      for (int64_t k = before * channels; k < behind * channels; ++k) to[k] = from[k];
      fill(to, behind * channels, line);
    }
  }

  // The input under tap t of the place `offset` places behind the part's first.
  const float* under(int64_t t, int64_t offset) const {
    return memory_ + offsets_[t] + offset * shape_.in_step * shape_.in_channels;
  }

 private:
  static int64_t within(int64_t value, int64_t high) {
    return value < 0 ? 0 : value < high ? value : high;
  }

  static void fill(float* to, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) to[k] = 0;
  }

  float* memory_;
  int64_t* offsets_;  // by tap
  const Shape& shape_;
  Reach rows_, columns_;
  int64_t count_ = 0;  // of the places for which the offsets are right
};

// All output channels from `channel` on, `vectors` vectors of them, of neighbouring places.
template <int places, int vectors>
FASTADV_LEVEL void multiply_from_few(const FewTask& task, const PaddedInputs& inputs,
                                     const RowPart& part, int64_t offset, int64_t channel) {
  const Shape& shape = task.shape;
  const float* filters = task.packed + channel * shape.depth();
  const int64_t step = shape.in_step * shape.in_channels;
  V sums[places][vectors];
#pragma GCC unroll 8
  for (int p = 0; p < places; ++p) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) sums[p][n] = zero();
  }
  for (int p = 0; p < places; ++p) {
    for (int n = 0; n < vectors; ++n) {
      conv::fetch_ahead(task.out, task.epilogue,
                        part.result + (offset + p) * task.apart() + channel + n * kLanes);
    }
  }
  for (int64_t t = 0; t < shape.taps; ++t) {
    const float* from = inputs.under(t, offset);
    for (int64_t c = 0; c < shape.in_channels; ++c, ++from) {
      V filter[vectors];
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) filter[n] = load(filters + n * kLanes);
      filters += vectors * kLanes;
#pragma GCC unroll 8
      for (int p = 0; p < places; ++p) {
        const V input = constant(from[p * step]);
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sums[p][n] = fmadd(input, filter[n], sums[p][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < places; ++p) {
    const int64_t result = part.result + (offset + p) * task.apart();
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const int64_t at = channel + n * kLanes, left = shape.out_channels - at;
      if (left > 0) {
        conv::finish(task.out, sums[p][n], task.epilogue, result + at, at, live_lanes(left));
      }
    }
  }
}

using MultiplyFromFew = void (*)(const FewTask&, const PaddedInputs&, const RowPart&, int64_t,
                                 int64_t);

template <int vectors>
constexpr MultiplyFromFew kFromFew[kRows] = {
    multiply_from_few<1, vectors>, multiply_from_few<2, vectors>, multiply_from_few<3, vectors>,
    multiply_from_few<4, vectors>, multiply_from_few<5, vectors>, multiply_from_few<6, vectors>};

inline const MultiplyFromFew* from_few_of(int64_t vectors) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return kFromFew<4>;
    if (vectors == 3) return kFromFew<3>;
    if (vectors == 1) return kFromFew<1>;
  }
  return kFromFew<2>;
}

// The sum of a place's products, finished.
inline float finished(float value, const FloatEpilogue& epilogue, int64_t at, int64_t channel) {
  if (epilogue.bias) value += epilogue.bias[channel];
  if (epilogue.add) value += epilogue.add[at];
  if (epilogue.relu && value < 0) value = 0;  // NaN stays
  return epilogue.mask && !(epilogue.mask[at] > 0) ? 0 : value;
}

// All results of neighbouring places.
template <int places, int results>
FASTADV_LEVEL void multiply_to_few(const FewTask& task, const RowPart& part, int64_t offset) {
  const Shape& shape = task.shape;
  const int64_t channels = shape.in_channels, whole = channels / kLanes * kLanes;
  const Live rest = live_lanes(channels - whole);
  V sums[places][results];
#pragma GCC unroll 8
  for (int p = 0; p < places; ++p) {
#pragma GCC unroll 4
    for (int k = 0; k < results; ++k) sums[p][k] = zero();
  }
  for (int64_t t = 0; t < shape.taps; ++t) {
    const float* from[places];
    if (!find_inputs(from, shape, part, part.column + offset, t, task.zeros)) continue;
    const float* filters = task.packed + t * channels;
    for (int64_t c = 0; c < whole; c += kLanes) {
      V filter[results];
#pragma GCC unroll 4
      for (int k = 0; k < results; ++k) filter[k] = load(filters + k * shape.depth() + c);
#pragma GCC unroll 8
      for (int p = 0; p < places; ++p) {
        const V input = load(from[p] + c);
#pragma GCC unroll 4
        for (int k = 0; k < results; ++k) sums[p][k] = fmadd(input, filter[k], sums[p][k]);
      }
    }
    if (whole == channels) continue;
#pragma GCC unroll 8
    for (int p = 0; p < places; ++p) {
      const V input = load(from[p] + whole, rest);
#pragma GCC unroll 4
      for (int k = 0; k < results; ++k) {
        sums[p][k] = fmadd(input, load(filters + k * shape.depth() + whole, rest), sums[p][k]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < places; ++p) {
    const int64_t result = part.result + (offset + p) * task.apart();
#pragma GCC unroll 4
    for (int k = 0; k < results; ++k) {
      task.out[result + k] = finished(sum(sums[p][k]), task.epilogue, result + k, k);
    }
  }
}

using MultiplyToFew = void (*)(const FewTask&, const RowPart&, int64_t);

// The places whose results are summed together: their sums fill the registers.
template <int results>
constexpr int kPlaces = kSums / results < 8 ? kSums / results : 8;

template <int results, int places = kPlaces<results>>
MultiplyToFew to_few_of(int64_t now) {
  if constexpr (places > 1) {
    if (now < places) return to_few_of<results, places - 1>(now);
  }
  return multiply_to_few<places, results>;
}

template <int results>
void convolve_to(const FewTask& task, const float* x, int64_t first, int64_t count) {
  for_row_parts(x, task.shape, first, count, [&](const RowPart& part) {
    for (int64_t offset = 0; offset < part.count;) {
      const int64_t now = conv::next_rows(part.count - offset, kPlaces<results>);
      to_few_of<results>(now)(task, part, offset);
      offset += now;
    }
  });
}

void convolve_from_few(float* out, const float* x, const float* packed, const Shape& shape,
                       const FloatEpilogue& epilogue, int64_t first, int64_t count, void* scratch) {
  const FewTask task{out, packed, nullptr, shape, epilogue};
  auto* offsets = static_cast<int64_t*>(scratch);
  PaddedInputs inputs(reinterpret_cast<float*>(offsets + shape.taps), offsets, shape);
  const int64_t channels = conv::padded(shape.out_channels), block = kVectors * kLanes;
  for_row_parts(x, shape, first, count, [&](const RowPart& part) {
    inputs.copy(part);
    for (int64_t channel = 0; channel < channels; channel += block) {
      const int64_t width = channels - channel < block ? channels - channel : block;
      const MultiplyFromFew* multiply = from_few_of(width / kLanes);
      for (int64_t offset = 0; offset < part.count;) {
        const int64_t now = conv::next_rows(part.count - offset, kRows);
        multiply[now - 1](task, inputs, part, offset, channel);
        offset += now;
      }
    }
  });
}

void convolve_to_few(float* out, const float* x, const float* packed, const Shape& shape,
                     const FloatEpilogue& epilogue, int64_t first, int64_t count, void* scratch) {
  auto* zeros = static_cast<float*>(scratch);
  for (int64_t c = 0; c < shape.in_channels; ++c) zeros[c] = 0;
  const FewTask task{out, packed, zeros, shape, epilogue};
  switch (shape.out_channels) {
    case 1:
      return convolve_to<1>(task, x, first, count);
    case 2:
      return convolve_to<2>(task, x, first, count);
    case 3:
      return convolve_to<3>(task, x, first, count);
    case 4:
      return convolve_to<4>(task, x, first, count);
  }
}

}  // namespace
}  // namespace fastadv::conv_gather
