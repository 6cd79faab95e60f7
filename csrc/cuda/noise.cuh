// Philox 4x32-10 noise in CUDA C++. Definition: fastadv/ops/philox.py and
// fastadv/ops/random_start.py.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/noise.h"

namespace fastadv::cuda {

constexpr int kNoiseThreads = 128;

struct Key {
  uint64_t seed;
  uint64_t sample;
  uint32_t stream;
};

struct Words {
  uint32_t at[4];
};

// One block of random words.
__device__ inline Words philox(const Key& key, uint64_t block) {
  uint32_t c0 = uint32_t(block), c1 = key.stream;
  uint32_t c2 = uint32_t(key.sample), c3 = uint32_t(key.sample >> 32);
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53) * c0, p1 = uint64_t(0xCD9E8D57) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// A multiple of 2^-23 in [-1, 1): exact in float.
__device__ inline float symmetric_uniform(uint32_t word) {
  return float(int32_t(word >> 8) - (1 << 23)) * 0x1p-23f;
}

// The sum of a word's bytes less its mean, nearly Gaussian.
__device__ inline int32_t near_gaussian(uint32_t word) {
  return int32_t((word & 0xff) + (word >> 8 & 0xff) + (word >> 16 & 0xff) + (word >> 24)) - 510;
}

// Of random sign, the magnitude nearly exponential.
__device__ inline int32_t near_laplace(uint32_t word) {
  const int32_t bits = __float_as_int(float(int32_t(word >> 8 | 1)));
  const int32_t exponent = (bits >> 23) - 127, fraction = bits >> 7 & 0xffff;
  const int32_t slope = 28916 - ((fraction * (16125 - (fraction * 5566 >> 16))) >> 16);
  const int32_t bend = ((fraction * (0x10000 - fraction)) >> 15) * slope >> 17;
  const int32_t magnitude = ((24 - exponent) << 16) - fraction - bend;
  return word & 1 ? -magnitude : magnitude;
}

// x + noise, clipped: what is done to one element with its word.
template <class C, Ball kBall>
struct AddNoise {
  C scale, low, high;

  __device__ C operator()(C x, uint32_t word) const {
    C unit;
    if constexpr (kBall == Ball::kLinf) unit = C(symmetric_uniform(word));
    if constexpr (kBall == Ball::kL2) unit = C(near_gaussian(word));
    if constexpr (kBall == Ball::kL1) unit = C(near_laplace(word));
    return clip(x + unit * scale, low, high);
  }
};

// How threads divide a sample. kPlanes = 1 or 3: a thread takes one contiguous run, the pixels of
// whole Philox blocks in that many interleaved channels, in 16-byte accesses. kPlanes = 0, any
// layout: a thread takes one block of four logical elements.
template <class T, int kPlanes>
struct Share {
  static constexpr int kPixels = kPlanes == 0 ? 4 : sizeof(T) == 2 ? 8 : 4;
  static constexpr int kElements = kPlanes * kPixels;

  static int64_t blocks_per_sample(const Noise& n) {
    const int64_t pixels = kPlanes == 0 ? n.size : n.size / kPlanes;
    return divide_up(divide_up(pixels, kPixels), kNoiseThreads);
  }

  // Applies f to this thread's elements of a sample.
  template <class F>
  static __device__ void apply(T* out, const T* x, int64_t index, const Noise& n, const Key& key,
                               const F& f) {
    if constexpr (kPlanes == 0) {
      if (index * 4 >= n.size) return;
      const Words words = philox(key, index);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (index * 4 + k >= n.size) return;
        const int64_t at = offset(index * 4 + k, n.walk);
        out[at] = rounded<T>(f(load(x[at]), words.at[k]));
      }
    } else {
      if (index * kElements >= n.size) return;
      auto run = load_vector<kElements>(x + index * kElements);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
        for (int pixel = 0; pixel < kPixels; pixel += 4) {
          const int64_t logical = plane * n.walk.plane_size + index * kPixels + pixel;
          const Words words = philox(key, logical / 4);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            T& element = run.at[(pixel + k) * kPlanes + plane];
            element = rounded<T>(f(load(element), words.at[k]));
          }
        }
      }
      store_vector(out + index * kElements, run);
    }
  }

  // Copies this thread's elements of a sample.
  static __device__ void copy(T* out, const T* from, int64_t index, const Noise& n) {
    if constexpr (kPlanes == 0) {
      for (int64_t i = index * 4; i < min(index * 4 + 4, n.size); ++i) {
        const int64_t at = offset(i, n.walk);
        out[at] = from[at];
      }
    } else if (index * kElements < n.size) {
      store_vector(out + index * kElements, load_vector<kElements>(from + index * kElements));
    }
  }

 private:
  static __device__ int64_t offset(int64_t logical, const Walk& walk) {
    const int64_t plane = logical / walk.plane_size;
    return plane * walk.plane_stride + (logical - plane * walk.plane_size) * walk.element_stride;
  }
};

// What a block works on: a sample and this thread's share of it.
struct Place {
  int64_t row, index;
  Key key;

  __device__ Place(const Noise& n, unsigned blocks_per_sample) {
    const unsigned row_ = blockIdx.x / blocks_per_sample;
    row = row_;
    index = int64_t(blockIdx.x - row_ * blocks_per_sample) * kNoiseThreads + threadIdx.x;
    key = {n.seed, uint64_t(n.ids ? n.ids[row] : row), 0};
  }
};

// Calls f(Type<T>{}, Count<planes>{}) for the widest share that the operands allow; `also` is a
// further operand or null.
template <class F>
cudaError_t dispatch_share(const Noise& n, const void* also, F&& f) {
  return dispatch(n.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool even = aligned(n.walk.plane_size, Share<T, 1>::kPixels, n.out, n.x, also);
    if (even && n.walk.planes == 1 && n.walk.element_stride == 1) return f(t, Count<1>{});
    if (even && n.walk.planes == 3 && n.walk.element_stride == 3) return f(t, Count<3>{});
    return f(t, Count<0>{});
  });
}

}  // namespace fastadv::cuda
