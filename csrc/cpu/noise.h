// Philox 4x32-10 noise on the CPU. Definition: fastadv/ops/philox.py and
// fastadv/ops/random_start.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/tensor.h"

namespace fastadv {

constexpr int kWords = 4;     // 32-bit words per Philox block
constexpr int kBlocks = 16;   // blocks computed side by side, one per SIMD lane
constexpr int kChunk = 1024;  // words generated at a time
constexpr uint32_t kRadiusStream = 1;

struct Key {
  uint64_t seed;
  uint64_t sample;
  uint32_t stream;
};

// Words of kBlocks consecutive blocks from `first` on, in logical order.
FASTADV_INLINE void philox_blocks(uint32_t* words, uint64_t first, const Key& key) {
  uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
  for (int l = 0; l < kBlocks; ++l) {
    c0[l] = uint32_t(first + l);
    c1[l] = key.stream;
    c2[l] = uint32_t(key.sample);
    c3[l] = uint32_t(key.sample >> 32);
  }
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kBlocks; ++l) {
      const uint64_t p0 = uint64_t(0xD2511F53) * c0[l], p1 = uint64_t(0xCD9E8D57) * c2[l];
      c0[l] = uint32_t(p1 >> 32) ^ c1[l] ^ k0;
      c2[l] = uint32_t(p0 >> 32) ^ c3[l] ^ k1;
      c1[l] = uint32_t(p1);
      c3[l] = uint32_t(p0);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int l = 0; l < kBlocks; ++l) {
    words[kWords * l] = c0[l];
    words[kWords * l + 1] = c1[l];
    words[kWords * l + 2] = c2[l];
    words[kWords * l + 3] = c3[l];
  }
}

// kChunk words from logical index `begin` (a multiple of kChunk) on.
FASTADV_INLINE void fill_words(uint32_t* words, int64_t begin, Key key) {
  for (int64_t i = 0; i < kChunk; i += kWords * kBlocks) {
    philox_blocks(words + i, uint64_t(begin + i) / kWords, key);
  }
}

// A multiple of 2^-23 in [-1, 1): exact in float.
FASTADV_INLINE float symmetric_uniform(uint32_t word) {
  return float(int32_t(word >> 8) - (1 << 23)) * 0x1p-23f;
}

// The sum of a word's bytes less its mean, nearly Gaussian.
FASTADV_INLINE int32_t near_gaussian(uint32_t word) {
  return int32_t((word & 0xff) + (word >> 8 & 0xff) + (word >> 16 & 0xff) + (word >> 24)) - 510;
}

// Of random sign, the magnitude nearly exponential.
FASTADV_INLINE int32_t near_laplace(uint32_t word) {
  const int32_t bits = std::bit_cast<int32_t>(float(int32_t(word >> 8 | 1)));
  const int32_t exponent = (bits >> 23) - 127, fraction = bits >> 7 & 0xffff;
  const int32_t slope = 28916 - ((fraction * (16125 - (fraction * 5566 >> 16))) >> 16);
  const int32_t bend = ((fraction * (0x10000 - fraction)) >> 15) * slope >> 17;
  const int32_t magnitude = ((24 - exponent) << 16) - fraction - bend;
  return word & 1 ? -magnitude : magnitude;
}

// Calls f(logical index, offset in memory, element stride, count) for the runs that make up [begin,
// end).
template <class F>
FASTADV_INLINE void for_runs(const SampleLayout& layout, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t plane = begin / layout.plane_size, within = begin - plane * layout.plane_size;
    const int64_t count = std::min(end - begin, layout.plane_size - within);
    f(begin, plane * layout.plane_stride + within * layout.element_stride, count);
    begin += count;
  }
}

struct NoiseLimits {
  double eps, low, high;
};

template <class T>
FASTADV_INLINE void add_linf_noise(T* out, const T* x, const uint32_t* words, int64_t count,
                                   int64_t stride, NoiseLimits limits) {
  using C = Compute<T>;
  const C eps = C(limits.eps), low = C(limits.low), high = C(limits.high);
  for (int64_t i = 0; i < count; ++i) {
    const C noise = C(symmetric_uniform(words[i])) * eps;
    C moved = load(x[i * stride]) + noise;
    moved = moved < low ? low : moved;
    store(out[i * stride], moved > high ? high : moved);
  }
}

// One sample, clip(x + U(-eps, eps)), its numbers those of logical index 0, 1, ...
template <class T>
void linf_noise_sample(T* out, const T* x, const SampleLayout& layout, const Key& key,
                       const NoiseLimits& limits) {
  uint32_t words[kChunk];
  const int64_t size = layout.planes * layout.plane_size;
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    FASTADV_DISPATCH(fill_words(words, begin, key));
    for_runs(layout, begin, std::min(begin + kChunk, size),
             [&](int64_t index, int64_t offset, int64_t count) {
               FASTADV_DISPATCH(add_linf_noise(out + offset, x + offset, words + (index - begin),
                                               count, layout.element_stride, limits));
             });
  }
}

inline uint64_t sample_id(const int64_t* ids, int64_t sample) {
  return uint64_t(ids ? ids[sample] : sample);
}

inline const int64_t* ids_pointer(const at::Tensor& ids) {
  return ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr;
}

}  // namespace fastadv
