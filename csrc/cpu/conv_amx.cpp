// The inner loops of csrc/cpu/conv_amx.h, apart from torch's headers as those of conv3x3_avx512.cpp
// are.
#include "cpu/conv_amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "cpu/conv_inner.h"

#define FASTADV_AMX \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace fastadv::conv_amx {
namespace {

constexpr int64_t kRows = 16;             // of a tile: images
constexpr int64_t kTile = 512;            // bfloat16 numbers of a tile
constexpr int64_t kInputBytes = 1 << 20;  // of a part: half of the second-level cache

constexpr int kAskForPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of arch_prctl
constexpr int kTileData = 18;              // the state component that holds the tiles

bool ask() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!conv::supported() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tiles = d >> 24 & 1;
  return bf16 && tiles && syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
}

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
};

// Not a local variable: GCC 12 takes the instruction to read 8 bytes, and drops what is written to
// the others.
constinit const Configuration kConfiguration;

// Where a place's taps read, and with which filters.
struct Taps {
  const uint16_t** inputs;
  int64_t* filters;  // in tiles of 32 input channels, from the block's first
  int64_t count;
};

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The memory of a part.
struct Scratch {
  uint16_t* inputs;  // [rows][width][images][pixel]
  float* sums;       // [places of a row][images][32]
  Taps taps;
};

// sums[images][32] = the inputs under the taps times the filters of up to 32 channels; `next` is
// how far it is to the inputs of the second tile. Tiles 0 to 3 hold sums, 4 and 5 inputs, 6 and 7
// filters.
template <bool two_rows, bool two_columns>
FASTADV_AMX void multiply(float* sums, const Taps& taps, int64_t next, const uint16_t* filters,
                          const Plan& plan) {
  constexpr int64_t kStep = two_columns ? 2 * kTile : kTile;
  constexpr int64_t kTileRow = 64, kSumRow = kBlock * 4;
  const int64_t channels = plan.shape.in_channels, input_bytes = plan.pixel * 2;
  _tile_zero(0);
  if constexpr (two_columns) _tile_zero(1);
  if constexpr (two_rows) _tile_zero(2);
  if constexpr (two_rows && two_columns) _tile_zero(3);
  for (int64_t t = 0; t < taps.count; ++t) {
    const uint16_t *input = taps.inputs[t], *filter = filters + taps.filters[t] * kStep;
    for (int64_t c = 0; c < channels; c += kDepth, filter += kStep) {
      _tile_loadd(6, filter, kTileRow);
      _tile_loadd(4, input + c, input_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (two_columns) {
        _tile_loadd(7, filter + kTile, kTileRow);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (two_rows) {
        _tile_loadd(5, input + next + c, input_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSumRow);
  if constexpr (two_columns) _tile_stored(1, sums + conv::kVector, kSumRow);
  if constexpr (two_rows) _tile_stored(2, sums + kRows * kBlock, kSumRow);
  if constexpr (two_rows && two_columns) {
    _tile_stored(3, sums + kRows * kBlock + conv::kVector, kSumRow);
  }
}

// One part: its first image and row of results, and how many there are.
struct Part {
  int64_t image, images, row, rows;
};

// Lays out the inputs of a part, images innermost; the row of input 0 may lie outside the image.
FASTADV_AMX void fill(uint16_t* inputs, const uint16_t* x, const Part& part, const Plan& plan) {
  const Shape& shape = plan.shape;
  const int64_t channels = shape.in_channels, width = shape.in_width;
  const int64_t first = part.row * shape.in_step + plan.first_tap;
  const int64_t count = (part.rows - 1) * shape.in_step + plan.tap_rows;
  const int64_t begin = std::max<int64_t>(first, 0), end = std::min(first + count, shape.in_height);
  const int64_t step = plan.images * plan.pixel;
  for (int64_t n = 0; n < part.images; ++n) {
    const uint16_t* image = x + (part.image + n) * shape.in_height * width * channels;
    for (int64_t i = begin; i < end; ++i) {
      const uint16_t* from = image + i * width * channels;
      uint16_t* to = inputs + (i - first) * width * step + n * plan.pixel;
      for (int64_t j = 0; j < width; ++j, from += channels, to += step) {
        for (int64_t c = 0; c < channels; c += kDepth) {
          _mm512_store_si512(to + c, _mm512_loadu_si512(from + c));
        }
      }
    }
  }
}

// The taps of the place (i, j) that lie in the image.
void find_taps(Taps& taps, const uint16_t* inputs, const Part& part, const Plan& plan, int64_t i,
               int64_t j) {
  const Shape& shape = plan.shape;
  const int64_t first = part.row * shape.in_step + plan.first_tap;
  const int64_t tiles = shape.in_channels / kDepth;
  taps.count = 0;
  for (int64_t t = 0; t < shape.taps; ++t) {
    const int64_t row = i * shape.in_step + shape.tap_rows[t];
    const int64_t column = j * shape.in_step + shape.tap_columns[t];
    if (row < 0 || row >= shape.in_height || column < 0 || column >= shape.in_width) continue;
    const int64_t place = (row - first) * shape.in_width + column;
    taps.inputs[taps.count] = inputs + place * plan.images * plan.pixel;
    taps.filters[taps.count++] = t * tiles;
  }
}

// Whether the place right of (i, j) has the same taps in the image.
bool same_taps_next(const Shape& shape, int64_t j) {
  for (int64_t t = 0; t < shape.taps; ++t) {
    const int64_t column = j * shape.in_step + shape.tap_columns[t], next = column + shape.in_step;
    const bool inside = column >= 0 && column < shape.in_width;
    if (inside != (next >= 0 && next < shape.in_width)) return false;
  }
  return true;
}

// Finishes the sums of one row of places, [places][images][32], image by image.
FASTADV_AMX void finish_row(uint16_t* out, const float* sums, const Part& part, int64_t i,
                            int64_t channel, int64_t columns, const Plan& plan,
                            const conv::Epilogue& epilogue) {
  const Shape& shape = plan.shape;
  const int64_t width = shape.grid_width(), row = i * shape.out_step + shape.out_row;
  for (int64_t n = 0; n < part.images; ++n) {
    const int64_t line = ((part.image + n) * shape.out_height + row) * shape.out_width;
    for (int64_t j = 0; j < width; ++j) {
      const int64_t at = (line + j * shape.out_step + shape.out_column) * shape.out_channels;
      const float* from = sums + (j * plan.images + n) * kBlock;
      for (int64_t c = 0; c < columns; c += conv::kVector) {
        const __mmask16 live = conv::lanes(shape.out_channels - channel - c);
        conv::finish(out, _mm512_load_ps(from + c), epilogue, at + channel + c, channel + c, live);
      }
    }
  }
}

template <bool two_columns>
FASTADV_AMX void multiply_row(Scratch& scratch, const uint16_t* filters, const Part& part,
                              const Plan& plan, int64_t i) {
  const Shape& shape = plan.shape;
  const int64_t width = shape.grid_width(), place = plan.images * kBlock;
  const int64_t right = shape.in_step * plan.images * plan.pixel;
  for (int64_t j = 0; j < width; ++j) {
    find_taps(scratch.taps, scratch.inputs, part, plan, i, j);
    float* sums = scratch.sums + j * place;
    if (part.images > kRows) {
      multiply<true, two_columns>(sums, scratch.taps, kRows * plan.pixel, filters, plan);
    } else if (plan.images == kRows && j + 1 < width && same_taps_next(shape, j)) {
      multiply<true, two_columns>(sums, scratch.taps, right, filters, plan);
      ++j;
    } else {
      multiply<false, two_columns>(sums, scratch.taps, 0, filters, plan);
    }
  }
}

// GCC ignores the target of a constructor, so these are functions.
FASTADV_AMX void configure() { _tile_loadconfig(&kConfiguration); }
FASTADV_AMX void release() { _tile_release(); }

}  // namespace

bool supported() {
  static const bool answer = ask();
  return answer;
}

// The filters of 16 output channels and 32 inputs at a tap, forward: an output channel's inputs lie
// side by side.
FASTADV_AMX static void pack_rows(uint16_t* tile, const Filters& f, int64_t first, int64_t c,
                                  int64_t tap, int64_t real) {
  const __m512i pairs = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192,
                                          208, 224, 240);
  for (int64_t o = 0; o < conv::kVector; ++o) {
    __m512i row = _mm512_setzero_si512();
    if (o < real) {
      const float* from = f.weight + ((first + o) * f.size + tap) * f.in_channels + c;
      const __m512 by = _mm512_set1_ps(f.scale ? f.scale[first + o] : 1);
      row = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from + 16), by),
                                         _mm512_mul_ps(_mm512_loadu_ps(from), by));
    }
    _mm512_i32scatter_epi32(tile + 2 * o, pairs, row, 4);
  }
}

// The same backward: an input channel's outputs lie side by side.
FASTADV_AMX static void pack_columns(uint16_t* tile, const Filters& f, int64_t first, int64_t c,
                                     int64_t tap, int64_t real) {
  const __mmask16 mask = __mmask16((1u << real) - 1);
  for (int64_t k = 0; k < kDepth; k += 2) {
    __m512i halves[2];
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t in = c + k + side;
      const float* from = f.weight + (in * f.size + tap) * f.out_channels + first;
      const __m512 by = _mm512_set1_ps(f.scale ? f.scale[in] : 1);
      const __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from), by);
      halves[side] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
    }
    _mm512_storeu_si512(tile + k * conv::kVector,
                        _mm512_or_si512(halves[0], _mm512_slli_epi32(halves[1], 16)));
  }
}

FASTADV_AMX void pack(uint16_t* packed, const Filters& f, int64_t out) {
  const int64_t tiles = std::min(conv::padded(f.out_channels) - out, kBlock) / conv::kVector;
  for (int64_t t = 0; t < f.tap_count; ++t) {
    for (int64_t c = 0; c < f.in_channels; c += kDepth) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = out + tile * conv::kVector;
        const int64_t real = std::clamp<int64_t>(f.out_channels - first, 0, conv::kVector);
        (f.backward ? pack_columns : pack_rows)(packed, f, first, c, f.taps[t], real);
        packed += kTile;
      }
    }
  }
}

Plan::Plan(const Shape& of, int64_t threads) : shape(of), first_tap(0), tap_rows(1) {
  if (shape.taps > 0) {
    const auto [low, high] = std::minmax_element(shape.tap_rows, shape.tap_rows + shape.taps);
    first_tap = *low;
    tap_rows = *high - *low + 1;
  }
  // At multiples of 1024 bytes a tile's rows meet in few sets of the first-level cache.
  pixel = shape.in_channels % 512 == 0 ? shape.in_channels + kDepth : shape.in_channels;
  // Few places of a row have neighbours with the same taps; then a second tile is of other images.
  images = shape.grid_width() < 16 && shape.batch > kRows ? 2 * kRows : kRows;
  const int64_t row_bytes = shape.in_width * images * pixel * 2, height = shape.grid_height();
  const int64_t held =
      (kInputBytes / std::max<int64_t>(row_bytes, 1) - tap_rows) / shape.in_step + 1;
  rows = std::clamp<int64_t>(held, 1, height);
  // All threads get alike numbers of parts.
  const int64_t wanted = groups() * ((height + rows - 1) / rows);
  const int64_t even = (wanted + threads - 1) / threads * threads;
  parts_per_group = std::clamp<int64_t>(even / groups(), 1, height);
  rows = (height + parts_per_group - 1) / parts_per_group;
  parts_per_group = (height + rows - 1) / rows;
}

int64_t Plan::scratch_bytes() const {
  const int64_t in_rows = (rows - 1) * shape.in_step + tap_rows;
  return aligned(in_rows * shape.in_width * images * pixel * 2) +
         aligned(shape.grid_width() * images * kBlock * 4) + aligned(shape.taps * 16);
}

FASTADV_AMX void convolve(uint16_t* out, const uint16_t* x, const uint16_t* packed,
                          const Plan& plan, const conv::Epilogue& epilogue, int64_t number,
                          void* memory) {
  const Shape& shape = plan.shape;
  const int64_t image = number / plan.parts_per_group * plan.images;
  const int64_t row = number % plan.parts_per_group * plan.rows;
  const Part part{image, std::min(plan.images, shape.batch - image), row,
                  std::min(plan.rows, shape.grid_height() - row)};
  auto* bytes = static_cast<std::byte*>(memory);
  Scratch scratch;
  scratch.sums = reinterpret_cast<float*>(bytes);
  bytes += aligned(shape.grid_width() * plan.images * kBlock * 4);
  scratch.taps.inputs = reinterpret_cast<const uint16_t**>(bytes);
  scratch.taps.filters = reinterpret_cast<int64_t*>(bytes + shape.taps * 8);
  scratch.inputs = reinterpret_cast<uint16_t*>(bytes + aligned(shape.taps * 16));
  fill(scratch.inputs, x, part, plan);
  const int64_t channels = conv::padded(shape.out_channels);
  configure();
  for (int64_t channel = 0; channel < channels; channel += kBlock) {
    const int64_t columns = std::min(channels - channel, kBlock);
    const uint16_t* filters = packed + channel * shape.depth();
    for (int64_t i = row; i < row + part.rows; ++i) {
      if (columns == kBlock) {
        multiply_row<true>(scratch, filters, part, plan, i);
      } else {
        multiply_row<false>(scratch, filters, part, plan, i);
      }
      finish_row(out, scratch.sums, part, i, channel, columns, plan, epilogue);
    }
  }
  release();
}

}  // namespace fastadv::conv_amx

#else

namespace fastadv::conv_amx {

bool supported() { return false; }
Plan::Plan(const Shape& of, int64_t) : shape(of) {}
int64_t Plan::scratch_bytes() const { return 0; }
void pack(uint16_t*, const Filters&, int64_t) {}
void convolve(uint16_t*, const uint16_t*, const uint16_t*, const Plan&, const conv::Epilogue&,
              int64_t, void*) {}

}  // namespace fastadv::conv_amx

#endif
