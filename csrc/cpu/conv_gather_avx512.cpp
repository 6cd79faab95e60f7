// The inner loops of csrc/cpu/conv_gather.h, apart from torch's headers as those of
// conv3x3_avx512.cpp are.
#include "cpu/conv_gather.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cstring>

#include "cpu/conv_inner.h"

namespace fastadv::conv {

bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace fastadv::conv

namespace fastadv::conv_gather {
namespace {

struct Place {
  int64_t image, row, column;  // on the grid
};

Place place_of(const Shape& shape, int64_t index) {
  const int64_t width = shape.grid_width(), size = shape.grid_height() * width;
  const int64_t within = index % size;
  return {index / size, within / width, within % width};
}

// The inputs under all taps of one place, side by side.
void gather_row(uint16_t* row, const uint16_t* x, const Shape& shape, const Place& place) {
  const int64_t channels = shape.in_channels, bytes = channels * int64_t(sizeof(uint16_t));
  for (int64_t t = 0; t < shape.taps; ++t, row += channels) {
    const int64_t i = place.row * shape.in_step + shape.tap_rows[t];
    const int64_t j = place.column * shape.in_step + shape.tap_columns[t];
    if (i < 0 || i >= shape.in_height || j < 0 || j >= shape.in_width) {
      std::memset(row, 0, bytes);
    } else {
      const int64_t pixel = (place.image * shape.in_height + i) * shape.in_width + j;
      std::memcpy(row, x + pixel * channels, bytes);
    }
  }
}

// Finishes `width` channels of one place.
FASTADV_AVX512 void store_place(uint16_t* out, const float* sums, int64_t width, const Shape& shape,
                                const Place& place, int64_t channel,
                                const conv::Epilogue& epilogue) {
  const int64_t i = place.row * shape.out_step + shape.out_row;
  const int64_t j = place.column * shape.out_step + shape.out_column;
  const int64_t pixel = (place.image * shape.out_height + i) * shape.out_width + j;
  for (int64_t c = channel; c < channel + width; c += conv::kVector) {
    conv::finish(out, _mm512_loadu_ps(sums + c - channel), epilogue, pixel * shape.out_channels + c,
                 c, conv::lanes(shape.out_channels - c));
  }
}

}  // namespace

int64_t scratch_bytes(const Shape& shape, int64_t places) {
  return places *
         (shape.depth() * int64_t(sizeof(uint16_t)) + conv::kWide * int64_t(sizeof(float)));
}

void convolve(uint16_t* out, const uint16_t* x, const uint16_t* packed, const Shape& shape,
              const conv::Epilogue& epilogue, int64_t first, int64_t count, void* scratch) {
  const int64_t depth = shape.depth(), channels = conv::padded(shape.out_channels);
  float* sums = static_cast<float*>(scratch);
  uint16_t* rows = reinterpret_cast<uint16_t*>(sums + count * conv::kWide);
  for (int64_t p = 0; p < count; ++p) {
    gather_row(rows + p * depth, x, shape, place_of(shape, first + p));
  }
  for (int64_t channel = 0; channel < channels; channel += conv::kWide) {
    const int64_t width = channels - channel < conv::kWide ? channels - channel : conv::kWide;
    conv::multiply_block(sums, rows, packed + channel * depth, depth, count, width);
    for (int64_t p = 0; p < count; ++p) {
      store_place(out, sums + p * width, width, shape, place_of(shape, first + p), channel,
                  epilogue);
    }
  }
}

}  // namespace fastadv::conv_gather

#else

namespace fastadv::conv {

bool supported() { return false; }

}  // namespace fastadv::conv

namespace fastadv::conv_gather {

int64_t scratch_bytes(const Shape&, int64_t) { return 0; }
void convolve(uint16_t*, const uint16_t*, const uint16_t*, const Shape&, const conv::Epilogue&,
              int64_t, int64_t, void*) {}

}  // namespace fastadv::conv_gather

#endif
