// The inner loops of csrc/cpu/conv_weight_amx.h, apart from torch's headers as those of
// conv3x3_avx512.cpp are.
#include "cpu/conv_weight_amx.h"

#include <algorithm>

namespace fastadv::conv_weight {
namespace {

constexpr int64_t kMostSteps = 96;  // of a chunk, if it has more than one image

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

}  // namespace

Plan::Plan(const Shape& s) : shape(s), first_row(0), last_row(0) {
  for (int64_t r = 0; r < s.kernel_height; ++r) {
    const int64_t from = r * s.dilate_height - s.pad_height;
    const int64_t row = floor_div(from, s.stride_height), rest = from - row * s.stride_height;
    first_row = std::min(first_row, row);
    last_row = std::max(last_row, row);
    for (int64_t c = 0; c < s.kernel_width; ++c) {
      const int64_t column = c * s.dilate_width - s.pad_width;
      int64_t at = 0;
      while (at < int64_t(groups.size()) &&
             (groups[at].remainder != rest || groups[at].column != column)) {
        ++at;
      }
      if (at == int64_t(groups.size())) groups.push_back({rest, column});
      taps.push_back({r * s.kernel_width + c, at, row});
    }
  }
  std::stable_sort(taps.begin(), taps.end(),
                   [](const Tap& a, const Tap& b) { return a.group < b.group; });
  // Rows above an image are zeros. Where those below it are, too, both may be the same.
  const bool zeros_below = s.out_height * s.stride_height >= s.in_height;
  const int64_t gap = zeros_below ? std::max(last_row, -first_row) : last_row - first_row;
  row_pairs = (s.out_width + 1) / 2;
  image_rows = s.out_height + gap;
  const int64_t pairs = image_rows * row_pairs;
  images = std::clamp<int64_t>(kMostSteps * kTileSide / pairs, 1, s.batch);
  const int64_t even_chunks = (s.batch + images - 1) / images;
  images = (s.batch + even_chunks - 1) / even_chunks;
  steps = (images * pairs + kTileSide - 1) / kTileSide;
  // A tile past the last pair, and a line that keeps the blocks off the same sets of the caches.
  const int64_t all_pairs = (images * image_rows - first_row + last_row) * row_pairs;
  block = (all_pairs + kTileSide + 1) * kPair;
}

int64_t input_rows(const Plan& plan) {
  return plan.images * plan.image_rows - plan.first_row + plan.last_row + 1;
}

}  // namespace fastadv::conv_weight

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#define FASTADV_AMX \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,prfchw")))
#define FASTADV_AMX_INLINE inline FASTADV_AMX __attribute__((always_inline))
#define FASTADV_LEVEL_INLINE FASTADV_AMX_INLINE
#include "cpu/transpose_avx512.h"

namespace fastadv::conv_weight {
namespace {

alignas(64) constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                           37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                           11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// Two places of 32 channels, number by number: the first 16 channels and the others.
FASTADV_AMX_INLINE void interleave(__m512i& low, __m512i& high, const uint16_t* first,
                                   const uint16_t* second) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i a = first ? _mm512_loadu_si512(first) : zero;
  const __m512i b = second ? _mm512_loadu_si512(second) : zero;
  const __m512i at = _mm512_load_si512(kLow);
  low = _mm512_permutex2var_epi16(a, at, b);
  high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(at, _mm512_set1_epi16(16)), b);
}

}  // namespace

FASTADV_AMX void pack_gradient(uint16_t* packed, const uint16_t* gradient, const Plan& plan,
                               int64_t chunk, int64_t step) {
  const Shape& s = plan.shape;
  const uint16_t* places[kTileSide][2];
  const int64_t left = s.batch - chunk * plan.images;
  for (int64_t i = 0; i < kTileSide; ++i) {
    const int64_t pair = step * kTileSide + i;
    const int64_t row = pair / plan.row_pairs, column = pair % plan.row_pairs * 2;
    const int64_t image = row / plan.image_rows, line = row % plan.image_rows;
    const bool real = image < std::min(left, plan.images) && line < s.out_height;
    const int64_t at = ((chunk * plan.images + image) * s.out_height + line) * s.out_width + column;
    places[i][0] = real ? gradient + at * s.out_channels : nullptr;
    places[i][1] =
        real && column + 1 < s.out_width ? gradient + (at + 1) * s.out_channels : nullptr;
  }
  for (int64_t k = 0; k < s.out_channels; k += kChannels) {
    __m512i low[kTileSide], high[kTileSide];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTileSide; ++i) {
      const auto [a, b] = places[i];
      interleave(low[i], high[i], a ? a + k : nullptr, b ? b + k : nullptr);
    }
    uint16_t* to = packed + (k / kTileSide * plan.steps + step) * kTile;
    vec::store_transposed(to, low);
    vec::store_transposed(to + plan.steps * kTile, high);
  }
}

FASTADV_AMX void pack_input(uint16_t* packed, const uint16_t* x, const Plan& plan, int64_t chunk,
                            int64_t row) {
  const Shape& s = plan.shape;
  const bool past = row + 1 == input_rows(plan);  // the zeros that the last tile reads
  const int64_t pairs = past ? kTileSide : plan.row_pairs, number = row + plan.first_row;
  const int64_t image = number < 0 ? 0 : number / plan.image_rows;
  const int64_t line = number - image * plan.image_rows, in_image = chunk * plan.images + image;
  const int64_t blocks = s.in_channels / kTileSide;
  for (int64_t g = 0; g < int64_t(plan.groups.size()); ++g) {
    const Group& group = plan.groups[g];
    const int64_t in_row = line * s.stride_height + group.remainder;
    const bool real = !past && number >= 0 && image < plan.images && in_image < s.batch &&
                      line < s.out_height + plan.last_row && in_row < s.in_height;
    const uint16_t* from = x + (in_image * s.in_height + in_row) * s.in_width * s.in_channels;
    uint16_t* to = packed + g * blocks * plan.block + row * plan.row_pairs * kPair;
    for (int64_t c = 0; c < s.in_channels; c += kChannels, to += 2 * plan.block) {
      if (!real) {
        for (int64_t i = 0; i < pairs; ++i) {
          _mm512_storeu_si512(to + i * kPair, _mm512_setzero_si512());
          _mm512_storeu_si512(to + plan.block + i * kPair, _mm512_setzero_si512());
        }
        continue;
      }
      int64_t column = group.column;
      for (int64_t i = 0; i < pairs; ++i) {
        const int64_t next = column + s.stride_width;
        const bool has_first = column >= 0 && column < s.in_width;
        const bool has_second = next >= 0 && next < s.in_width;
        __m512i low, high;
        interleave(low, high, has_first ? from + column * s.in_channels + c : nullptr,
                   has_second ? from + next * s.in_channels + c : nullptr);
        _mm512_storeu_si512(to + i * kPair, low);
        _mm512_storeu_si512(to + plan.block + i * kPair, high);
        column = next + s.stride_width;
      }
    }
  }
}

// GCC ignores the target of a lambda in a function without it.
FASTADV_AMX void multiply(float* out, float* sums, const uint16_t* gradient, const uint16_t* x,
                          const Plan& plan, int64_t chunk, const Part& part) {
  const int64_t taps = int64_t(plan.taps.size()), channels = plan.shape.in_channels;
  const int64_t stride = taps * channels * 4;  // bytes
  const uint16_t* const gradients = gradient + part.filter / kTileSide * plan.steps * kTile;
  const uint16_t* const inputs = x + part.channel / kTileSide * plan.block;
  float* const result = out + part.filter * taps * channels + part.channel;
  const bool first = chunk == 0, last = chunk + 1 == plan.chunks();
  for (int64_t t = part.first_tap; t < part.last_tap; ++t) {
    const Tap& tap = plan.taps[t];
    const uint16_t* a = gradients;
    const uint16_t* b = inputs + tap.group * channels / kTileSide * plan.block +
                        (tap.row - plan.first_row) * plan.row_pairs * kPair;
    float* const sum = sums + t * kChannels * kChannels;
    float* const to = result + tap.place * channels;
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sum, 64);
      _tile_loadd(1, sum + 256, 64);
      _tile_loadd(2, sum + 512, 64);
      _tile_loadd(3, sum + 768, 64);
    }
    for (int64_t k = 0; last && k < kChannels; ++k) {
      __builtin_prefetch(to + k * taps * channels, 1, 3);
      __builtin_prefetch(to + k * taps * channels + kTileSide, 1, 3);
    }
    for (int64_t i = 0; i < plan.steps; ++i, a += kTile, b += kTile) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a + plan.steps * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, b + plan.block, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (last) {
      float* const below = to + kTileSide * taps * channels;
      _tile_stored(0, to, stride);
      _tile_stored(1, to + kTileSide, stride);
      _tile_stored(2, below, stride);
      _tile_stored(3, below + kTileSide, stride);
    } else {
      _tile_stored(0, sum, 64);
      _tile_stored(1, sum + 256, 64);
      _tile_stored(2, sum + 512, 64);
      _tile_stored(3, sum + 768, 64);
    }
  }
}

}  // namespace fastadv::conv_weight

#else

namespace fastadv::conv_weight {

void pack_gradient(uint16_t*, const uint16_t*, const Plan&, int64_t, int64_t) {}
void pack_input(uint16_t*, const uint16_t*, const Plan&, int64_t, int64_t) {}
void multiply(float*, float*, const uint16_t*, const uint16_t*, const Plan&, int64_t, const Part&) {
}

}  // namespace fastadv::conv_weight

#endif
