// The loops of csrc/cpu/conv_gather_float.h for one kind of vector. The includer defines
// FASTADV_LEVEL and FASTADV_LEVEL_INLINE, includes csrc/cpu/vector_avx512.h or vector_avx2.h and
// then csrc/cpu/vector_finish.h, and defines kVectors, the vectors of output channels multiplied
// together.
#pragma once

#include <utility>

#include "cpu/conv_gather_float.h"
#include "cpu/conv_gather_places.h"

namespace fastadv::conv_gather {
namespace {

using namespace vec;

// Places multiplied together, at most. A narrower block leaves registers for more of them, and
// wants them: each filter is read once for all.
constexpr int rows_of(int vectors) { return 6 + 2 * (kVectors - vectors); }
constexpr int64_t kBlock = kVectors * kLanes;
// Bytes of filters that are used for all places of a task before the next ones, so that they stay
// in the first cache.
constexpr int64_t kDeepBytes = 32 << 10;

// A part of the sum over taps and input channels: several whole taps, or channels of one.
struct Part {
  int64_t first_tap, last_tap, first_channel, last_channel;
  bool begins, ends;  // whether it is the first, and whether it is the last
};

// What the places of a task have in common, for one block of output channels.
struct Task {
  float* out;
  float* sums;  // [places][width of the block]
  Places<float> places;
  const Shape& shape;
  const FloatEpilogue& epilogue;
  int64_t channel;
};

// One part of the results of `rows` places from `place` on. `filters` are those of the part.
template <int rows, int vectors>
FASTADV_LEVEL void multiply(const Task& task, const Part& part, int64_t place,
                            const float* filters) {
  float* kept = task.sums + place * vectors * kLanes;
  V sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      sum[r][n] = part.begins ? zero() : load(kept + (r * vectors + n) * kLanes);
    }
  }
  if (part.ends && task.shape.out_step > 1) {  // else it costs more than it saves
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      for (int n = 0; n < vectors; ++n) {
        conv::fetch_ahead(task.out, task.epilogue,
                          task.places.results[place + r] + task.channel + n * kLanes);
      }
    }
  }
  for (int64_t t = part.first_tap; t < part.last_tap; ++t) {
    const float* from[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) from[r] = task.places.under(t, place)[r];
    for (int64_t c = part.first_channel; c < part.last_channel; ++c) {
      V filter[vectors];
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) filter[n] = load(filters + n * kLanes);
      filters += vectors * kLanes;
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const V input = constant(from[r][c]);
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[r][n] = fmadd(input, filter[n], sum[r][n]);
      }
    }
  }
  if (part.ends) {
    int64_t at[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) at[r] = task.places.results[place + r] + task.channel;
    conv::finish_all(task.out, sum, task.epilogue, at, task.channel, task.shape.out_channels);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) store(kept + (r * vectors + n) * kLanes, sum[r][n]);
  }
}

using Multiply = void (*)(const Task&, const Part&, int64_t, const float*);

template <int vectors, class Rows = std::make_integer_sequence<int, rows_of(vectors)>>
struct MultiplyBy;
template <int vectors, int... rows>
struct MultiplyBy<vectors, std::integer_sequence<int, rows...>> {
  static constexpr Multiply kOf[] = {multiply<rows + 1, vectors>...};  // by places less one
};

template <int vectors>
void multiply_rows(const Task& task, const Part& part, const float* filters) {
  for (int64_t place = 0; place < task.places.count;) {
    const int64_t now = conv::next_rows(task.places.count - place, rows_of(vectors));
    MultiplyBy<vectors>::kOf[now - 1](task, part, place, filters);
    place += now;
  }
}

void multiply_part(const Task& task, const Part& part, const float* filters, int64_t width) {
  if constexpr (kVectors == 4) {
    if (width == 4 * kLanes) return multiply_rows<4>(task, part, filters);
    if (width == 3 * kLanes) return multiply_rows<3>(task, part, filters);
    if (width == kLanes) return multiply_rows<1>(task, part, filters);
  }
  multiply_rows<2>(task, part, filters);
}

void multiply_block(const Task& task, const float* filters, int64_t width) {
  const Shape& shape = task.shape;
  if (shape.depth() == 0) {  // such as places between the taps of a strided convolution
    multiply_part(task, Part{0, 0, 0, 0, true, true}, filters, width);
    return;
  }
  const int64_t deep = kDeepBytes / (width * int64_t(sizeof(float)));
  const int64_t channels = shape.in_channels, pieces = (channels + deep - 1) / deep;
  const int64_t piece = (channels + pieces - 1) / pieces;
  const int64_t taps = channels < deep ? deep / channels : 1;  // of a part
  for (int64_t t = 0; t < shape.taps; t += taps) {
    for (int64_t c = 0; c < channels; c += piece) {
      Part part{t, t + taps, c, c + piece, t == 0 && c == 0, false};
      if (part.last_tap > shape.taps) part.last_tap = shape.taps;
      if (part.last_channel > channels) part.last_channel = channels;
      part.ends = part.last_tap == shape.taps && part.last_channel == channels;
      multiply_part(task, part, filters + (t * channels + c) * width, width);
    }
  }
}

void convolve(float* out, const float* x, const float* packed, const Shape& shape,
              const FloatEpilogue& epilogue, int64_t first, int64_t count, void* scratch) {
  auto* sums = static_cast<float*>(scratch);
  auto* results = reinterpret_cast<int64_t*>(sums + count * conv::kWide);
  const Places<float> places{count, results, reinterpret_cast<const float**>(results + count)};
  auto* zeros = reinterpret_cast<float*>(places.sources + count * shape.taps);
  for (int64_t c = 0; c < shape.in_channels; ++c) zeros[c] = 0;
  find_places(places, zeros, x, shape, first);
  const int64_t channels = conv::padded(shape.out_channels);
  for (int64_t channel = 0; channel < channels; channel += kBlock) {
    const int64_t width = channels - channel < kBlock ? channels - channel : kBlock;
    const Task task{out, sums, places, shape, epilogue, channel};
    multiply_block(task, packed + channel * shape.depth(), width);
  }
}

}  // namespace
}  // namespace fastadv::conv_gather
