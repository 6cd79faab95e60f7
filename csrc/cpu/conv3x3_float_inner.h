// The loops of csrc/cpu/conv3x3_float.h for one kind of vector. The includer also includes
// csrc/cpu/vector_finish.h and defines kVectors, the vectors of output channels multiplied
// together.
#pragma once

#include "cpu/conv3x3_float.h"
#include "cpu/conv3x3_tiles.h"

namespace fastadv::conv3x3 {
namespace {

constexpr int kRows = 6;  // of tiles multiplied together, at most: see conv::next_rows
constexpr int64_t kBlock = kVectors * kLanes;
// Steps over input channels by which filters are read ahead: they come from the memory farthest
// away, and once for many tiles. Saves a tenth of the time or more from 256 channels on.
constexpr int64_t kAhead = 16;
constexpr int64_t kKeptBytes = 8 << 20;  // of filters that the caches may keep until they are used

// m[rows][vectors * kLanes] = v[rows][channels] times a block of filters [channels][vectors *
// kLanes].
template <int rows, int vectors>
FASTADV_LEVEL void multiply(float* m, const float* v, const float* filters, int64_t channels) {
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) sum[r][n] = zero();
  }
  for (int64_t c = 0; c < channels; ++c) {
    V filter[vectors];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      filter[n] = load(filters + (c * vectors + n) * kLanes);
      if (n * kLanes % conv::kVector == 0) {  // once for each line
        __builtin_prefetch(filters + ((c + kAhead) * vectors + n) * kLanes);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V input = constant(v[r * channels + c]);
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) sum[r][n] = fmadd(input, filter[n], sum[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) store(m + (r * vectors + n) * kLanes, sum[r][n]);
  }
}

using Multiply = void (*)(float*, const float*, const float*, int64_t);

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

void multiply_block(float* m, const float* v, const float* filters, int64_t channels, int64_t rows,
                    int64_t width) {
  while (rows > 0) {
    const int64_t now = conv::next_rows(rows);
    multiply_of(now, width / kLanes)(m, v, filters, channels);
    m += now * width;
    v += now * channels;
    rows -= now;
  }
}

// Channels of the block that begins at `block`.
inline int64_t width_of(int64_t block, int64_t channels) {
  return channels - block < kBlock ? channels - block : kBlock;
}

void convolve(float* out, const float* x, const float* packed, const Shape& shape,
              const FloatEpilogue& epilogue, int64_t first, int64_t count, void* scratch) {
  const int64_t in = shape.in_channels, channels = conv::padded(shape.out_channels);
  float* m = static_cast<float*>(scratch);
  const int64_t span = channels < kFloatSpan ? channels : kFloatSpan;
  float* v = m + kPoints * count * span;
  for (int64_t t = 0; t < count; ++t) {
    gather_tile(v + t * in, count * in, x, shape, place_of(shape, first + t));
  }
  for (int64_t begin = 0; begin < channels; begin += span) {
    const int64_t wide = channels - begin < span ? channels - begin : span;
    for (int64_t point = 0; point < kPoints; ++point) {
      for (int64_t block = 0; block < wide; block += kBlock) {
        const float* filters = packed + (point * channels + begin + block) * in;
        float* products = m + (point * wide + block) * count;
        multiply_block(products, v + point * count * in, filters, in, count, width_of(block, wide));
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      const TilePlace place = place_of(shape, first + t);
      for (int64_t block = 0; block < wide; block += kBlock) {
        const int64_t width = width_of(block, wide);
        scatter_tile(out, m + block * count + t * width, count * wide, width, shape, place,
                     begin + block, epilogue);
      }
    }
  }
}

// Each of the 36 points of a filter lies far from the others, often by a power of two. Written one
// by one they would push one another out of the caches before a line is full. So several input
// channels are gathered in a buffer, whose lines are then written whole.
FASTADV_LEVEL void transform_filters(float* packed, const Filters& f, int64_t first) {
  constexpr int kTogether = 8;  // input channels, of which there are whole vectors
  static_assert(kLanes % kTogether == 0);
  alignas(64) float buffer[kPoints][kTogether][conv::kVector];
  const int64_t channels = conv::padded(f.out_channels), block = first / kBlock * kBlock;
  const int64_t width = width_of(block, channels);
  // Filters that the caches would not keep are written past them, if lines are aligned.
  const int64_t bytes = kPoints * channels * f.in_channels * int64_t(sizeof(float));
  const bool past_caches = bytes > kKeptBytes && reinterpret_cast<uintptr_t>(packed) % 64 == 0;
  for (int64_t begin = 0; begin < f.in_channels; begin += kTogether) {
    for (int i = 0; i < kTogether; ++i) {
      for (int n = 0; n < conv::kVector; n += kLanes) {
        V u[6][6];
        transform_taps(u, f, first + n, begin + i);
        for (int point = 0; point < kPoints; ++point) {
          store(buffer[point][i] + n, u[point / 6][point % 6]);
        }
      }
    }
    for (int64_t point = 0; point < kPoints; ++point) {
      float* to =
          packed + (point * channels + block) * f.in_channels + begin * width + first - block;
      for (int i = 0; i < kTogether; ++i) {
        for (int n = 0; n < conv::kVector; n += kLanes) {
          const V values = load(buffer[point][i] + n);
          if (past_caches) {
            stream(to + i * width + n, values);
          } else {
            store(to + i * width + n, values);
          }
        }
      }
    }
  }
  if (past_caches) _mm_sfence();  // before another thread reads them
}

}  // namespace
}  // namespace fastadv::conv3x3
