// The inner loops of csrc/cpu/conv_gather.h, apart from torch's headers as those of
// conv3x3_avx512.cpp are.
#include "cpu/conv_gather.h"

#if defined(__x86_64__) && defined(__linux__)
#include <algorithm>
#include <cstring>

#include "cpu/conv_gather_places.h"
#include "cpu/conv_inner.h"
#include "cpu/isa_limit.h"

namespace fastadv::conv {

bool supported() {
  __builtin_cpu_init();
  return isa_limit() == IsaLimit::kNone && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

}  // namespace fastadv::conv

namespace fastadv::conv_gather {
namespace {

// `rows` places from `place` on times vectors * 16 filters from `channel` on.
template <int rows, int vectors>
FASTADV_AVX512 void multiply(uint16_t* out, const Places<uint16_t>& places, int64_t place,
                             const uint16_t* filters, int64_t channel, const Shape& shape,
                             const conv::Epilogue& epilogue) {
  __m512 sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) sum[r][n] = _mm512_setzero_ps();
  }
  for (int64_t t = 0; t < shape.taps; ++t) {
    const uint16_t* from[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) from[r] = places.under(t, place)[r];
    for (int64_t c = 0; c < shape.in_channels; c += 2) {
      __m512bh filter[vectors];
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) {
        filter[n] = (__m512bh)_mm512_loadu_si512(filters + 2 * n * conv::kVector);
      }
      filters += 2 * vectors * conv::kVector;
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        int32_t pair;
        std::memcpy(&pair, from[r] + c, sizeof(pair));
        const __m512bh input = conv::broadcast_pair(pair);
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], input, filter[n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const int64_t at = places.results[place + r];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const int64_t c = channel + n * conv::kVector;
      conv::finish(out, sum[r][n], epilogue, at + c, c, conv::lanes(shape.out_channels - c));
    }
  }
}

// `count` of at most `rows` places.
template <int rows, int vectors>
void multiply_up_to(int64_t count, uint16_t* out, const Places<uint16_t>& places, int64_t place,
                    const uint16_t* filters, int64_t channel, const Shape& shape,
                    const conv::Epilogue& epilogue) {
  if (rows == 1 || count == rows) {
    multiply<rows, vectors>(out, places, place, filters, channel, shape, epilogue);
  } else if constexpr (rows > 1) {
    multiply_up_to<rows - 1, vectors>(count, out, places, place, filters, channel, shape, epilogue);
  }
}

template <int vectors>
void multiply_places(uint16_t* out, const Places<uint16_t>& places, int64_t count,
                     const uint16_t* filters, int64_t channel, const Shape& shape,
                     const conv::Epilogue& epilogue) {
  for (int64_t place = 0; place < count;) {
    const int64_t now = conv::next_rows(count - place);
    multiply_up_to<6, vectors>(now, out, places, place, filters, channel, shape, epilogue);
    place += now;
  }
}

}  // namespace

int64_t scratch_bytes(const Shape& shape, int64_t places) {
  return places * int64_t(sizeof(int64_t) + shape.taps * sizeof(uint16_t*)) +
         shape.in_channels * int64_t(sizeof(uint16_t));
}

void convolve(uint16_t* out, const uint16_t* x, const uint16_t* packed, const Shape& shape,
              const conv::Epilogue& epilogue, int64_t first, int64_t count, void* scratch) {
  auto* results = static_cast<int64_t*>(scratch);
  const Places<uint16_t> places{count, results,
                                reinterpret_cast<const uint16_t**>(results + count)};
  auto* zeros = reinterpret_cast<uint16_t*>(places.sources + count * shape.taps);
  std::memset(zeros, 0, shape.in_channels * sizeof(uint16_t));
  find_places(places, zeros, x, shape, first);
  const int64_t channels = conv::padded(shape.out_channels);
  for (int64_t channel = 0; channel < channels; channel += conv::kWide) {
    const uint16_t* filters = packed + channel * shape.depth();
    const auto multiply_block = [&](auto multiply) {
      multiply(out, places, count, filters, channel, shape, epilogue);
    };
    switch (std::min<int64_t>(channels - channel, conv::kWide) / conv::kVector) {
      case 4:
        multiply_block(multiply_places<4>);
        break;
      case 3:
        multiply_block(multiply_places<3>);
        break;
      case 2:
        multiply_block(multiply_places<2>);
        break;
      default:
        multiply_block(multiply_places<1>);
        break;
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
