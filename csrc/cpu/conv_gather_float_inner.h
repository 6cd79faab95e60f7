// The loops of csrc/cpu/conv_gather_float.h for one kind of vector. The includer defines
// FASTADV_LEVEL and FASTADV_LEVEL_INLINE, includes csrc/cpu/vector_avx512.h or vector_avx2.h and
// then csrc/cpu/vector_finish.h, and defines kVectors, the vectors of output channels multiplied
// together.
#pragma once

#include "cpu/conv_gather_float.h"
#include "cpu/conv_gather_places.h"

namespace fastadv::conv_gather {
namespace {

using namespace vec;

constexpr int kRows = 6;  // of places multiplied together
constexpr int64_t kBlock = kVectors * kLanes;
// Products that are summed for all places of a task before the next ones, so that their filters, 32
// KiB, stay in the first cache.
constexpr int64_t kDeep = (32 << 10) / (kBlock * int64_t(sizeof(float)));

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
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      sum[r][n] = part.begins ? zero() : load(kept + (r * vectors + n) * kLanes);
    }
  }
  if (part.ends && task.shape.out_step > 1) {  // else it costs more than it saves
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      for (int n = 0; n < vectors; ++n) {
        conv::fetch_ahead(task.out, task.epilogue,
                          task.places.results[place + r] + task.channel + n * kLanes);
      }
    }
  }
  for (int64_t t = part.first_tap; t < part.last_tap; ++t) {
    const float* from[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) from[r] = task.places.sources[(place + r) * task.shape.taps + t];
    for (int64_t c = part.first_channel; c < part.last_channel; ++c) {
      V filter[vectors];
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) filter[n] = load(filters + n * kLanes);
      filters += vectors * kLanes;
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const V input = constant(from[r][c]);
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[r][n] = fmadd(input, filter[n], sum[r][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      if (!part.ends) {
        store(kept + (r * vectors + n) * kLanes, sum[r][n]);
        continue;
      }
      const int64_t channel = task.channel + n * kLanes, left = task.shape.out_channels - channel;
      if (left > 0) {
        conv::finish(task.out, sum[r][n], task.epilogue, task.places.results[place + r] + channel,
                     channel, live_lanes(left));
      }
    }
  }
}

using Multiply = void (*)(const Task&, const Part&, int64_t, const float*);

template <int vectors>
constexpr Multiply kMultiply[kRows] = {multiply<1, vectors>, multiply<2, vectors>,
                                       multiply<3, vectors>, multiply<4, vectors>,
                                       multiply<5, vectors>, multiply<6, vectors>};

inline Multiply multiply_of(int64_t rows, int64_t vectors) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return kMultiply<4>[rows - 1];
    if (vectors == 3) return kMultiply<3>[rows - 1];
    if (vectors == 1) return kMultiply<1>[rows - 1];
  }
  return kMultiply<2>[rows - 1];
}

void multiply_part(const Task& task, const Part& part, int64_t count, const float* filters,
                   int64_t width) {
  for (int64_t place = 0; place < count;) {
    const int64_t now = conv::next_rows(count - place);
    multiply_of(now, width / kLanes)(task, part, place, filters);
    place += now;
  }
}

void multiply_block(const Task& task, int64_t count, const float* filters, int64_t width) {
  const Shape& shape = task.shape;
  if (shape.depth() == 0) {  // such as places between the taps of a strided convolution
    multiply_part(task, Part{0, 0, 0, 0, true, true}, count, filters, width);
    return;
  }
  const int64_t channels = shape.in_channels, pieces = (channels + kDeep - 1) / kDeep;
  const int64_t piece = (channels + pieces - 1) / pieces;
  const int64_t taps = channels < kDeep ? kDeep / channels : 1;  // of a part
  for (int64_t t = 0; t < shape.taps; t += taps) {
    for (int64_t c = 0; c < channels; c += piece) {
      Part part{t, t + taps, c, c + piece, t == 0 && c == 0, false};
      if (part.last_tap > shape.taps) part.last_tap = shape.taps;
      if (part.last_channel > channels) part.last_channel = channels;
      part.ends = part.last_tap == shape.taps && part.last_channel == channels;
      multiply_part(task, part, count, filters + (t * channels + c) * width, width);
    }
  }
}

void convolve(float* out, const float* x, const float* packed, const Shape& shape,
              const FloatEpilogue& epilogue, int64_t first, int64_t count, void* scratch) {
  auto* sums = static_cast<float*>(scratch);
  auto* results = reinterpret_cast<int64_t*>(sums + count * conv::kWide);
  const Places<float> places{results, reinterpret_cast<const float**>(results + count)};
  auto* zeros = reinterpret_cast<float*>(places.sources + count * shape.taps);
  for (int64_t c = 0; c < shape.in_channels; ++c) zeros[c] = 0;
  find_places(places, zeros, x, shape, first, count);
  const int64_t channels = conv::padded(shape.out_channels);
  for (int64_t channel = 0; channel < channels; channel += kBlock) {
    const int64_t width = channels - channel < kBlock ? channels - channel : kBlock;
    const Task task{out, sums, places, shape, epilogue, channel};
    multiply_block(task, count, packed + channel * shape.depth(), width);
  }
}

}  // namespace
}  // namespace fastadv::conv_gather
