// The loops of csrc/cpu/conv_gather_float.h for images of few channels, as a network's first layer
// has them: few input channels, or few output channels in the gradient. Vectors of output channels
// would be mostly empty in the gradient, so that input channels fill them. The places of a row are
// found as they come: a table of them would cost more than the products. The includer does what
// csrc/cpu/conv_gather_float_inner.h wants, and also defines kSums.
#pragma once

#include <type_traits>

#include "cpu/conv_gather_float_inner.h"

namespace fastadv::conv_gather {
namespace {

using namespace vec;

// The pixels that the places of a task read, row by row of the grid, with those around the image:
// their channels, or pointers to them.
template <class T>
class PaddedInputs {
 public:
  // `outside` stands for every element of a pixel outside the image.
  PaddedInputs(void* scratch, const float* x, const Shape& shape, T outside)
      : x_(x),
        shape_(shape),
        outside_(outside),
        elements_(kPointers ? 1 : shape.in_channels),
        rows_(reach(shape.tap_rows, shape.taps)),
        columns_(reach(shape.tap_columns, shape.taps)),
        line_(padded_width(shape) * elements_),
        offsets_(static_cast<int64_t*>(scratch)),
        memory_(reinterpret_cast<T*>(offsets_ + shape.taps)) {
    for (int64_t t = 0; t < shape.taps; ++t) {
      offsets_[t] = (shape.tap_rows[t] - rows_.first) * line_ +
                    (shape.tap_columns[t] - columns_.first) * elements_;
    }
  }

  // Calls f for the parts of rows that the places [first, first + count) make, with their pixels
  // ready.
  template <class F>
  void for_row_parts(int64_t first, int64_t count, const F& f) {
    int64_t ready = 0;  // rows of the grid that f has not seen
    conv_gather::for_row_parts(shape_, first, count, [&](const RowPart& part) {
      if (ready == 0) {
        const int64_t below = shape_.grid_height() - part.row;
        const int64_t rows = (part.column + count - 1) / shape_.grid_width() + 1;
        ready = rows < below ? rows : below;
        read(part.image, part.row, ready);
      }
      f(part);
      --ready;
      count -= part.count;
    });
  }

  // The pixel of a part's place from which the taps' offsets count.
  const T* at(const RowPart& part, int64_t place) const {
    const int64_t row = part.row - first_, column = part.column + place;
    return memory_ + (row * line_ + column * elements_) * shape_.in_step;
  }
  const int64_t* offsets() const { return offsets_; }

 private:
  static constexpr bool kPointers = std::is_pointer_v<T>;

  void read(int64_t image, int64_t first, int64_t rows) {
    first_ = first;
    const int64_t channels = shape_.in_channels, height = shape_.in_height;
    const int64_t before = within(-columns_.first),
                  behind = within(shape_.in_width - columns_.first);
    const int64_t lines = padded_height(shape_, rows);
    for (int64_t r = 0; r < lines; ++r) {
      const int64_t row = first * shape_.in_step + rows_.first + r;
      const bool inside = row >= 0 && row < height && before < behind;
      const int64_t begin = inside ? before : 0, end = inside ? behind : 0;
      const float* from = x_ + (image * height + row) * shape_.in_width * channels;
      T* to = memory_ + r * line_;
      fill(to, 0, begin * elements_);
      if constexpr (kPointers) {
        for (int64_t k = begin; k < end; ++k) to[k] = from + (k + columns_.first) * channels;
      } else {
        from += columns_.first * channels;
        for (int64_t k = begin * channels; k < end * channels; ++k) to[k] = from[k];
      }
      fill(to, end * elements_, line_);
    }
  }

  // A column of a line, at most its end.
  int64_t within(int64_t column) const {
    const int64_t width = line_ / elements_;
    return column < 0 ? 0 : column < width ? column : width;
  }

  void fill(T* to, int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; ++k) to[k] = outside_;
  }

  const float* x_;
  const Shape& shape_;
  T outside_;
  int64_t elements_;  // of a pixel
  Reach rows_, columns_;
  int64_t line_;      // elements
  int64_t* offsets_;  // by tap, in elements
  T* memory_;
  int64_t first_ = 0;  // row of the grid whose inputs lie first
};

// What the places of a task have in common.
struct FewTask {
  float* out;
  const float* packed;
  const Shape& shape;
  const FloatEpilogue& epilogue;

  int64_t apart() const { return shape.out_step * shape.out_channels; }  // neighbours' results
};

// All output channels from `channel` on, `vectors` vectors of them, of neighbouring places.
template <int places, int vectors>
FASTADV_LEVEL void multiply_from_few(const FewTask& task, const float* inputs,
                                     const int64_t* offsets, int64_t result, int64_t channel) {
  const Shape& shape = task.shape;
  const float* filters = task.packed + channel * shape.depth();
  const int64_t step = shape.in_step * shape.in_channels, taps = shape.taps;
  const int64_t channels = shape.in_channels;
  V sums[places][vectors];
  int64_t at[places];
#pragma GCC unroll 16
  for (int p = 0; p < places; ++p) {
    at[p] = result + p * task.apart() + channel;
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      sums[p][n] = zero();
      conv::fetch_ahead(task.out, task.epilogue, at[p] + n * kLanes);
    }
  }
  for (int64_t t = 0; t < taps; ++t) {
    const float* from = inputs + offsets[t];
    for (int64_t c = 0; c < channels; ++c, ++from) {
      V filter[vectors];
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) filter[n] = load(filters + n * kLanes);
      filters += vectors * kLanes;
#pragma GCC unroll 16
      for (int p = 0; p < places; ++p) {
        const V input = constant(from[p * step]);
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sums[p][n] = fmadd(input, filter[n], sums[p][n]);
      }
    }
  }
  conv::finish_all(task.out, sums, task.epilogue, at, channel, shape.out_channels);
}

using MultiplyFromFew = void (*)(const FewTask&, const float*, const int64_t*, int64_t, int64_t);

template <int vectors, class Rows = std::make_integer_sequence<int, rows_of(vectors)>>
struct MultiplyFromFewBy;
template <int vectors, int... rows>
struct MultiplyFromFewBy<vectors, std::integer_sequence<int, rows...>> {
  static constexpr MultiplyFromFew kOf[] = {multiply_from_few<rows + 1, vectors>...};
};

template <int vectors>
void multiply_row(const FewTask& task, const PaddedInputs<float>& inputs, const RowPart& part,
                  int64_t channel) {
  for (int64_t offset = 0; offset < part.count;) {
    const int64_t now = conv::next_rows(part.count - offset, rows_of(vectors));
    MultiplyFromFewBy<vectors>::kOf[now - 1](task, inputs.at(part, offset), inputs.offsets(),
                                             part.result + offset * task.apart(), channel);
    offset += now;
  }
}

void convolve_from_few(float* out, const float* x, const float* packed, const Shape& shape,
                       const FloatEpilogue& epilogue, int64_t first, int64_t count, void* scratch) {
  const FewTask task{out, packed, shape, epilogue};
  PaddedInputs<float> inputs(scratch, x, shape, 0.f);
  const int64_t channels = conv::padded(shape.out_channels), block = kVectors * kLanes;
  inputs.for_row_parts(first, count, [&](const RowPart& part) {
    for (int64_t channel = 0; channel < channels; channel += block) {
      const int64_t width = channels - channel;
      if constexpr (kVectors == 4) {
        if (width >= 4 * kLanes) {
          multiply_row<4>(task, inputs, part, channel);
          continue;
        }
        if (width == 3 * kLanes) multiply_row<3>(task, inputs, part, channel);
        if (width == kLanes) multiply_row<1>(task, inputs, part, channel);
      }
      if (kVectors == 2 || width == 2 * kLanes) multiply_row<2>(task, inputs, part, channel);
    }
  });
}

// The sum of a place's products, finished.
inline float finished(float value, const FloatEpilogue& epilogue, int64_t at, int64_t channel) {
  if (epilogue.bias) value += epilogue.bias[channel];
  if (epilogue.add) value += epilogue.add[at];
  if (epilogue.relu && value < 0) value = 0;  // NaN stays
  return epilogue.mask && !(epilogue.mask[at] > 0) ? 0 : value;
}

// All results of neighbouring places of a row, the first of which has the pixel `pixels` and the
// result `result`.
template <int places, int results>
FASTADV_LEVEL void multiply_to_few(const FewTask& task, const float* const* pixels,
                                   const int64_t* offsets, int64_t row, int64_t result) {
  const Shape& shape = task.shape;
  const int64_t channels = shape.in_channels, whole = channels / kLanes * kLanes;
  const int64_t depth = shape.depth(), step = shape.in_step;
  const Live rest = live_lanes(channels - whole);
  constexpr int kCount = places * results;
  V sums[kCount];
#pragma GCC unroll 32
  for (int k = 0; k < kCount; ++k) sums[k] = zero();
  for (int64_t t = 0; t < shape.taps; ++t) {
    const int64_t line = row * step + shape.tap_rows[t];
    if (line < 0 || line >= shape.in_height) continue;
    const float* from[places];
#pragma GCC unroll 8
    for (int p = 0; p < places; ++p) from[p] = pixels[offsets[t] + p * step];
    const float* filters = task.packed + t * channels;
    for (int64_t c = 0; c < whole; c += kLanes) {
      V filter[results];
#pragma GCC unroll 4
      for (int k = 0; k < results; ++k) filter[k] = load(filters + k * depth + c);
#pragma GCC unroll 8
      for (int p = 0; p < places; ++p) {
        const V input = load(from[p] + c);
#pragma GCC unroll 4
        for (int k = 0; k < results; ++k) {
          sums[p * results + k] = fmadd(input, filter[k], sums[p * results + k]);
        }
      }
    }
    if (whole == channels) continue;
#pragma GCC unroll 8
    for (int p = 0; p < places; ++p) {
      const V input = load(from[p] + whole, rest);
#pragma GCC unroll 4
      for (int k = 0; k < results; ++k) {
        const V filter = load(filters + k * depth + whole, rest);
        sums[p * results + k] = fmadd(input, filter, sums[p * results + k]);
      }
    }
  }
  // The results of vectors of sums, and of the last, which may be fewer.
  constexpr int kLast = (kCount - 1) / kLanes * kLanes;
  V values[kLast / kLanes + 1];
#pragma GCC unroll 4
  for (int k = 0; k < kLast; k += kLanes) values[k / kLanes] = sums_of<kLanes>(sums + k);
  values[kLast / kLanes] = sums_of<kCount - kLast>(sums + kLast);
  const FloatEpilogue& e = task.epilogue;
  if (task.apart() == results && !e.bias && !e.add && !e.relu && !e.mask) {
#pragma GCC unroll 4
    for (int k = 0; k < kLast; k += kLanes) store(task.out + result + k, values[k / kLanes]);
    store(task.out + result + kLast, values[kLast / kLanes], live_lanes(kCount - kLast));
    return;
  }
  alignas(64) float one[kLast + kLanes];
#pragma GCC unroll 4
  for (int k = 0; k <= kLast; k += kLanes) store(one + k, values[k / kLanes]);
  for (int p = 0; p < places; ++p) {
    for (int k = 0; k < results; ++k) {
      const int64_t at = result + p * task.apart() + k;
      task.out[at] = finished(one[p * results + k], e, at, k);
    }
  }
}

using MultiplyToFew = void (*)(const FewTask&, const float* const*, const int64_t*, int64_t,
                               int64_t);

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
void convolve_to(const FewTask& task, PaddedInputs<const float*>& inputs, int64_t first,
                 int64_t count) {
  inputs.for_row_parts(first, count, [&](const RowPart& part) {
    for (int64_t offset = 0; offset < part.count;) {
      const int64_t now = conv::next_rows(part.count - offset, kPlaces<results>);
      to_few_of<results>(now)(task, inputs.at(part, offset), inputs.offsets(), part.row,
                              part.result + offset * task.apart());
      offset += now;
    }
  });
}

void convolve_to_few(float* out, const float* x, const float* packed, const Shape& shape,
                     const FloatEpilogue& epilogue, int64_t first, int64_t count, void* scratch) {
  auto* zeros = static_cast<float*>(scratch);
  for (int64_t c = 0; c < shape.in_channels; ++c) zeros[c] = 0;
  const FewTask task{out, packed, shape, epilogue};
  PaddedInputs<const float*> inputs(zeros + (shape.in_channels + 1) / 2 * 2, x, shape, zeros);
  switch (shape.out_channels) {
    case 1:
      return convolve_to<1>(task, inputs, first, count);
    case 2:
      return convolve_to<2>(task, inputs, first, count);
    case 3:
      return convolve_to<3>(task, inputs, first, count);
    case 4:
      return convolve_to<4>(task, inputs, first, count);
  }
}

}  // namespace
}  // namespace fastadv::conv_gather
