// The inner loops of csrc/cpu/conv_amx.h, apart from torch's headers as those of conv3x3_avx512.cpp
// are.
#include "cpu/conv_amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/conv_inner.h"

#define FASTADV_AMX                                                             \
  __attribute__((                                                               \
      target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16," \
             "prfchw")))
#define FASTADV_AMX_INLINE inline FASTADV_AMX __attribute__((always_inline))

namespace fastadv::conv_amx {
namespace {

constexpr int64_t kTile = 512;    // bfloat16 numbers of a tile
constexpr int64_t kAhead = 1024;  // bfloat16 numbers from what is copied to what is asked for

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
};

// Not a local variable: GCC 12 takes the instruction to read 8 bytes, and drops what is written to
// the others.
constinit const Configuration kConfiguration;

// What finishes whole blocks of sums, some rows at a time, while the next are multiplied. Tile
// instructions leave little room for others, so there is no test in it.
struct Finish {
  alignas(64) float sums[2 * kRows * kBlock];
  alignas(64) float bias[kBlock];
  float floor;    // 0 where negative results become 0
  uint16_t* out;  // like the others, at the group's first result and the block's first channel
  const uint16_t *add, *mask;
  const Row *row, *end;

  void start(const Tiles& tiles) {
    row = tiles.rows;
    end = row + tiles.count;
  }
};

FASTADV_AMX_INLINE __m512 widen(const uint16_t* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// Finishes the next `count` rows.
template <bool has_add, bool has_mask>
FASTADV_AMX_INLINE void finish_rows(Finish& f, int64_t count) {
  const __m512 floor = _mm512_set1_ps(f.floor);
  const Row* const last = std::min(f.row + count, f.end);
  for (; f.row < last; ++f.row) {
    const int64_t at = f.row->result;
    const float* sums = f.sums + f.row->sums;
    __m512 low = _mm512_add_ps(_mm512_load_ps(sums), _mm512_load_ps(f.bias));
    __m512 high =
        _mm512_add_ps(_mm512_load_ps(sums + conv::kVector), _mm512_load_ps(f.bias + conv::kVector));
    if constexpr (has_add) {
      low = _mm512_add_ps(low, widen(f.add + at));
      high = _mm512_add_ps(high, widen(f.add + at + conv::kVector));
    }
    low = _mm512_max_ps(floor, low);
    high = _mm512_max_ps(floor, high);
    __m512i narrow = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if constexpr (has_mask) {
      // Of bfloat16 numbers the bits 1 to 0x7f80 are those above 0.
      const __m512i less = _mm512_sub_epi16(_mm512_loadu_si512(f.mask + at), _mm512_set1_epi16(1));
      const __mmask32 positive = _mm512_cmplt_epu16_mask(less, _mm512_set1_epi16(0x7f80));
      narrow = _mm512_maskz_mov_epi16(positive, narrow);
    }
    _mm512_storeu_si512(f.out + at, narrow);
  }
}

// Asks for the memory that `finish_rows` will read and write for the next rows.
template <bool has_add, bool has_mask>
FASTADV_AMX_INLINE void prefetch_rows(const Finish& f, const Row*& row, int64_t count) {
  for (const Row* const last = std::min(row + count, f.end); row < last; ++row) {
    __builtin_prefetch(f.out + row->result, 1);
    if constexpr (has_add) __builtin_prefetch(f.add + row->result);
    if constexpr (has_mask) __builtin_prefetch(f.mask + row->result);
  }
}

// Memory that will be needed later, asked for some lines at a time while tiles are multiplied.
struct Ahead {
  const uint16_t *at = nullptr, *end = nullptr;
  int64_t share = 0;  // elements at every step

  void start(const uint16_t* from, const uint16_t* to, int64_t steps) {
    at = from;
    end = to;
    share = (((to - from) / kDepth + steps - 1) / std::max<int64_t>(steps, 1)) * kDepth;
  }
};

FASTADV_AMX_INLINE void prefetch_share(Ahead& ahead) {
  const uint16_t* const last = std::min(ahead.at + ahead.share, ahead.end);
  for (; ahead.at < last; ahead.at += kDepth) _mm_prefetch(ahead.at, _MM_HINT_T1);
}

// The sums of `coming` = the inputs under the taps times the filters of up to 32 channels, while
// `before` finishes earlier sums. Tiles 0 to 3 hold sums, 4 and 5 inputs, 6 and 7 filters.
template <bool has_add, bool has_mask, bool two_rows, bool two_columns>
FASTADV_AMX void multiply(Finish& coming, Finish& before, Ahead& ahead, const Tiles& tiles,
                          const uint16_t* input, const uint16_t* filter, const Plan& plan) {
  constexpr int64_t kStep = two_columns ? 2 * kTile : kTile;
  constexpr int64_t kTileRow = 64, kSumRow = kBlock * 4;
  const int64_t channels = plan.shape.in_channels, input_bytes = plan.pixel * 2;
  const int64_t next = tiles.next - tiles.input, depth = plan.shape.taps * kStep;
  const Tap* const begin = plan.taps.data() + tiles.first_tap;
  const Tap* const end = begin + tiles.taps;
  const int64_t steps = std::max<int64_t>(tiles.taps * (channels / kDepth), 1);
  const int64_t share = (2 * kRows + steps - 1) / steps;
  const Row* row = coming.row;
  input += tiles.input;
  _tile_zero(0);
  if constexpr (two_columns) _tile_zero(1);
  if constexpr (two_rows) _tile_zero(2);
  if constexpr (two_rows && two_columns) _tile_zero(3);
  for (int64_t c = 0; c < channels; c += kDepth, filter += depth, input += kDepth) {
    for (const Tap* tap = begin; tap < end; ++tap) {
      const uint16_t *from = input + tap->input, *by = filter + tap->filter * kStep;
      _tile_loadd(6, by, kTileRow);
      _tile_loadd(4, from, input_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (two_columns) {
        _tile_loadd(7, by + kTile, kTileRow);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (two_rows) {
        _tile_loadd(5, from + next, input_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
      finish_rows<has_add, has_mask>(before, share);
      prefetch_rows<has_add, has_mask>(coming, row, share);
      prefetch_share(ahead);
    }
  }
  finish_rows<has_add, has_mask>(before, 2 * kRows);  // where there is no tap
  float* const sums = coming.sums;
  _tile_stored(0, sums, kSumRow);
  if constexpr (two_columns) _tile_stored(1, sums + conv::kVector, kSumRow);
  if constexpr (two_rows) _tile_stored(2, sums + kRows * kBlock, kSumRow);
  if constexpr (two_rows && two_columns) {
    _tile_stored(3, sums + kRows * kBlock + conv::kVector, kSumRow);
  }
}

// The forms of `multiply` and `finish_rows` for one kind of epilogue.
struct Forms {
  decltype(&multiply<false, false, true, true>) multiply[2][2];  // by pair, by two columns
  void (*finish)(Finish&, int64_t);
};

template <bool has_add, bool has_mask>
constexpr Forms kForms{
    {{multiply<has_add, has_mask, false, false>, multiply<has_add, has_mask, false, true>},
     {multiply<has_add, has_mask, true, false>, multiply<has_add, has_mask, true, true>}},
    [](Finish& f, int64_t count) FASTADV_AMX { finish_rows<has_add, has_mask>(f, count); }};

const Forms& forms_for(const conv::Epilogue& epilogue) {
  if (epilogue.add) return epilogue.mask ? kForms<true, true> : kForms<true, false>;
  return epilogue.mask ? kForms<false, true> : kForms<false, false>;
}

// Finishes the sums of a block that lacks channels, or of a group that lacks images: its results
// end at `limit`.
FASTADV_AMX void finish_partly(Finish& f, const conv::Epilogue& epilogue, uint16_t* out, int64_t at,
                               int64_t limit, int64_t channel, int64_t channels) {
  for (; f.row < f.end; ++f.row) {
    if (f.row->result >= limit) continue;
    for (int64_t c = channel; c < std::min(channel + kBlock, channels); c += conv::kVector) {
      const __m512 sums = _mm512_load_ps(f.sums + f.row->sums + c - channel);
      conv::finish(out, sums, epilogue, at + f.row->result + c, c, conv::lanes(channels - c));
    }
  }
}

FASTADV_AMX_INLINE void copy(uint16_t* to, const uint16_t* from, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kDepth) {
    _mm_prefetch(from + c + kAhead, _MM_HINT_T0);
    _mm512_store_si512(to + c, _mm512_loadu_si512(from + c));
  }
}

// Zeros for `count` places of all images.
FASTADV_AMX void clear(uint16_t* to, int64_t count, const Plan& plan) {
  for (int64_t i = 0; i < count * plan.place(); i += kDepth) {
    _mm512_store_si512(to + i, _mm512_setzero_si512());
  }
}

// Lays out the inputs of a strip of a group, place by place, images innermost.
FASTADV_AMX void fill(uint16_t* inputs, const uint16_t* x, int64_t group, const Strip& strip,
                      const Plan& plan) {
  const Shape& shape = plan.shape;
  const int64_t channels = shape.in_channels, width = shape.in_width, step = shape.in_step;
  const int64_t first = strip.row * step + plan.first_tap;
  const int64_t rows = std::min(plan.rows, shape.grid_height() - strip.row);
  const int64_t count = (rows - 1) * step + plan.tap_rows;
  const int64_t image = group * plan.layout.images;
  const int64_t images = std::min(plan.layout.images, shape.batch - image);
  const int64_t row = plan.columns * step, place = plan.place();
  for (int64_t i = 0; i < count; ++i) {
    if (first + i < 0 || first + i >= shape.in_height) {
      clear(inputs + i * row * place, plan.layout.whole_rows ? plan.after : row, plan);
    }
  }
  const int64_t top = std::max<int64_t>(first, 0), past = std::min(first + count, shape.in_height);
  for (int64_t phase = 0; phase < step; ++phase) {
    // The columns of the image are p * step + phase - left for p in [begin, end).
    const int64_t before = std::max<int64_t>(plan.left - phase, 0);
    const int64_t columns = std::max<int64_t>(width + plan.left - phase, 0);
    const int64_t begin = std::min((before + step - 1) / step, plan.columns);
    const int64_t end = std::clamp((columns + step - 1) / step, begin, plan.columns);
    const int64_t column = begin * step + phase - plan.left;
    uint16_t* const rows_at = inputs + (phase * plan.columns - first * row) * place;
    for (int64_t i = top; i < past; ++i) {
      uint16_t* to = rows_at + i * row * place;
      clear(to, begin, plan);
      clear(to + end * place, plan.columns - end, plan);
    }
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t i = top; i < past; ++i) {
        const int64_t line = ((image + n) * shape.in_height + i) * width;
        const uint16_t* from = x + (line + column) * channels;
        uint16_t* to = rows_at + (i * row + begin) * place + n * plan.pixel;
        if (step == 1 && place == channels) {
          copy(to, from, (end - begin) * channels);
        } else {
          for (int64_t p = begin; p < end; ++p, to += place, from += step * channels) {
            copy(to, from, channels);
          }
        }
      }
    }
  }
  clear(inputs + count * row * place, plan.after, plan);
}

// GCC ignores the target of a constructor, so these are functions.
}  // namespace

FASTADV_AMX void configure() { _tile_loadconfig(&kConfiguration); }
FASTADV_AMX void release() { _tile_release(); }

FASTADV_AMX void convolve(uint16_t* out, const uint16_t* x, const uint16_t* packed,
                          const Plan& plan, const conv::Epilogue& epilogue, int64_t number,
                          void* memory) {
  const Shape& shape = plan.shape;
  const int64_t strips = int64_t(plan.strips.size());
  const Strip& strip = plan.strips[number % strips];
  const int64_t group = number / strips % plan.group_ranges * plan.groups_per_range;
  const int64_t groups = std::min(plan.groups_per_range, plan.groups() - group);
  const int64_t block = number / strips / plan.group_ranges * plan.blocks_per_range;
  const int64_t last_block = std::min(block + plan.blocks_per_range, plan.blocks());
  const int64_t channels = conv::padded(shape.out_channels);
  const int64_t image = shape.out_height * shape.out_width * shape.out_channels;
  auto* room = static_cast<uint16_t*>(memory);
  const int64_t input_image = shape.in_height * shape.in_width * shape.in_channels;
  const int64_t from_group = plan.layout.images * input_image;
  const int64_t to_group = plan.layout.images * image;
  const int64_t whole = plan.direct ? plan.results / to_group : 0;  // read where they lie
  if (plan.direct && group + groups > whole) {
    const int64_t skipped = (whole * shape.in_height + strip.row) * shape.in_width;
    const int64_t all = plan.results / shape.out_channels;
    const int64_t places = std::clamp<int64_t>(all - skipped, 0, plan.rows * shape.in_width);
    std::memcpy(room, x + skipped * shape.in_channels, size_t(places * shape.in_channels * 2));
  }
  configure();
  const Forms& forms = forms_for(epilogue);
  Finish finish[2];  // of the block at work and the one before, by turns
  int64_t turn = 0;
  for (Finish& f : finish) {
    f.floor = epilogue.relu ? 0 : -std::numeric_limits<float>::infinity();
    f.row = f.end = nullptr;
    std::fill_n(f.bias, kBlock, 0.0f);
  }
  Ahead ahead;
  const auto compute = [&](int64_t g, const Tiles& tiles, int64_t b) FASTADV_AMX {
    const int64_t channel = b * kBlock, at = (group + g) * to_group;
    const uint16_t* input = plan.tiles_first ? room : room + g * plan.group_elements;
    if (plan.direct) {
      input = group + g < whole ? x + (group + g) * from_group + strip.row * plan.row() : room;
    }
    Finish &coming = finish[turn], &before = finish[1 - turn];
    turn = 1 - turn;
    coming.start(tiles);
    const int64_t first = at + channel;
    coming.out = out + first;
    if (epilogue.add) coming.add = epilogue.add + first;
    if (epilogue.mask) coming.mask = epilogue.mask + first;
    const int64_t limit = plan.results - at;
    const bool complete = limit >= to_group && channel + kBlock <= shape.out_channels;
    if (!complete) coming.end = coming.row;
    if (complete && epilogue.bias) {
      std::memcpy(coming.bias, epilogue.bias + channel, sizeof(coming.bias));
    }
    const bool two_columns = channels - channel > conv::kVector;
    forms.multiply[tiles.pair][two_columns](coming, before, ahead, tiles, input,
                                            packed + channel * shape.depth(), plan);
    if (!complete) {
      coming.start(tiles);
      finish_partly(coming, epilogue, out, at, limit, channel, shape.out_channels);
    }
  };
  const Tiles *begin = plan.tiles.data() + strip.first, *end = begin + strip.count;
  const int64_t steps = strip.count * shape.depth() / kDepth;  // of a group and block
  if (plan.tiles_first) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t next = (group + g + 1) * plan.layout.images;
      if (next < shape.batch && strips == 1 && !plan.direct) {
        const int64_t images = std::min(plan.layout.images, shape.batch - next);
        const uint16_t* from = x + next * input_image;
        ahead.start(from, from + images * input_image, steps * (last_block - block));
      }
      if (!plan.direct) fill(room, x, group + g, strip, plan);
      for (const Tiles* tiles = begin; tiles < end; ++tiles) {
        for (int64_t b = block; b < last_block; ++b) compute(g, *tiles, b);
      }
    }
  } else {
    for (int64_t g = 0; g < groups && !plan.direct; ++g) {
      fill(room + g * plan.group_elements, x, group + g, strip, plan);
    }
    for (int64_t b = block; b < last_block; ++b) {
      const uint16_t* from = packed + (b + 1) * kBlock * shape.depth();
      const int64_t columns = std::clamp<int64_t>(channels - (b + 1) * kBlock, 0, kBlock);
      ahead.start(from, from + columns * shape.depth(), steps * groups);
      for (int64_t g = 0; g < groups; ++g) {
        for (const Tiles* tiles = begin; tiles < end; ++tiles) compute(g, *tiles, b);
      }
    }
  }
  forms.finish(finish[1 - turn], 2 * kRows);
  release();
}

}  // namespace fastadv::conv_amx

#else

namespace fastadv::conv_amx {

void configure() {}
void release() {}
void convolve(uint16_t*, const uint16_t*, const uint16_t*, const Plan&, const conv::Epilogue&,
              int64_t, void*) {}

}  // namespace fastadv::conv_amx

#endif
