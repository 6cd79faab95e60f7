// Storage types, 16-byte accesses and sums over a block, which every kernel uses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "cuda/arguments.h"

namespace fastadv::cuda {

// The type in which storage types are computed: double if one of them is double, else float.
template <class... T>
using Compute = std::conditional_t<(std::is_same_v<T, double> || ...), double, float>;

__device__ inline float load(float v) { return v; }
__device__ inline double load(double v) { return v; }
__device__ inline float load(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float load(__half v) { return __half2float(v); }

template <class T, class C>
__device__ T rounded(C v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(float(v));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(float(v));
  } else {
    return T(v);
  }
}

// Elements a thread handles at once: 16 bytes of the smallest of the types.
template <class... T>
constexpr int kVector = [] {
  size_t smallest = 16;
  ((smallest = sizeof(T) < smallest ? sizeof(T) : smallest), ...);
  return int(16 / smallest);
}();

template <class T, int N>
struct Vector {
  T at[N];
};

// A 16-byte store. Written out because the compiler splits some plain stores of a uint4 into four.
__device__ inline void store_16_bytes(void* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// N elements in 16-byte accesses; a single one (N = 1) in one of its own size.
template <int N, class T>
__device__ Vector<T, N> load_vector(const T* from) {
  Vector<T, N> to;
  if constexpr (N == 1) {
    to.at[0] = *from;
  } else {
    static_assert(sizeof(to) % 16 == 0);
    uint4 raw[sizeof(to) / 16];
#pragma unroll
    for (int i = 0; i < int(sizeof(to) / 16); ++i) raw[i] = reinterpret_cast<const uint4*>(from)[i];
    memcpy(&to, raw, sizeof(to));
  }
  return to;
}

template <int N, class T>
__device__ void store_vector(T* to, const Vector<T, N>& from) {
  if constexpr (N == 1) {
    *to = from.at[0];
  } else {
    static_assert(sizeof(from) % 16 == 0);
    uint4 raw[sizeof(from) / 16];
    memcpy(raw, &from, sizeof(from));
#pragma unroll
    for (int i = 0; i < int(sizeof(from) / 16); ++i) {
      store_16_bytes(reinterpret_cast<uint4*>(to) + i, raw[i]);
    }
  }
}

template <int N>
using Count = std::integral_constant<int, N>;

// Calls f(index, Count<n>) so that the block's threads cover 0 .. length - 1: in vectors of N where
// `vectors` says that they are aligned, the rest one by one. kUnroll vectors of a thread are loaded
// together, where f only reads.
template <int N, int kUnroll = 1, class F>
__device__ void for_elements(int64_t length, bool vectors, F f) {
  const int64_t whole = vectors ? length / N * N : 0;
#pragma unroll kUnroll
  for (int64_t i = int64_t(threadIdx.x) * N; i < whole; i += int64_t(blockDim.x) * N) {
    f(i, Count<N>{});
  }
  for (int64_t i = whole + threadIdx.x; i < length; i += blockDim.x) f(i, Count<1>{});
}

template <class C>
__device__ C clip(C v, C low, C high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

__device__ inline double number_of(const PerSample& n, int64_t sample) {
  if (!n.values) return n.number;
  const int64_t i = sample * n.stride;
  switch (n.dtype) {
    case Dtype::kFloat:
      return static_cast<const float*>(n.values)[i];
    case Dtype::kDouble:
      return static_cast<const double*>(n.values)[i];
    case Dtype::kBFloat16:
      return load(static_cast<const __nv_bfloat16*>(n.values)[i]);
    default:
      return load(static_cast<const __half*>(n.values)[i]);
  }
}

// A positive double rounded to 24 significant bits. The reason is in
// fastadv/ops/pgd_step_reference.py.
__device__ inline double rounded_to_float_precision(double v) {
  constexpr int kDropped = 29;
  return __longlong_as_double((__double_as_longlong(v) + (1LL << (kDropped - 1))) >>
                              kDropped << kDropped);
}

__device__ inline bool is_active(const bool* active, int64_t sample) {
  return !active || active[sample];
}

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kMostThreads = 512;

struct Add {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return b > a ? b : a;
  }
};

// K values of each thread combined over the warp; every lane has the same bits.
template <int K, class V, class Op>
__device__ void combine_warp(V (&values)[K], Op op) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      values[k] = op(values[k], __shfl_xor_sync(kAllLanes, values[k], distance));
    }
  }
}

// The same over the block, in an order that depends on nothing but the number of threads. Values
// must not be negative where Op is Larger. All threads of the block must call it.
template <int K, class V, class Op>
__device__ void combine_block(V (&values)[K], Op op) {
  __shared__ V of_warp[K][kMostThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  combine_warp(values, op);
  __syncthreads();  // an earlier call may still be reading
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) of_warp[k][warp] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = lane < int(blockDim.x / 32) ? of_warp[k][lane] : V(0);
  combine_warp(values, op);
}

}  // namespace fastadv::cuda
