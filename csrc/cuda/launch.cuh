// Host helpers of the launchers: types from dtypes, alignment, sizes of blocks.
#pragma once

#include "cuda/device.cuh"

namespace fastadv::cuda {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<storage type>{}).
template <class F>
cudaError_t dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(Type<float>{});
    case Dtype::kDouble:
      return f(Type<double>{});
    case Dtype::kBFloat16:
      return f(Type<__nv_bfloat16>{});
    default:
      return f(Type<__half>{});
  }
}

// Whether rows of `size` elements can be read in vectors of `width` from all these addresses.
template <class... P>
bool aligned(int64_t size, int width, const P*... at) {
  return size % width == 0 && ((reinterpret_cast<uintptr_t>(at) % 16 == 0) && ...);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of a block that loops over `length` elements: four vectors each, in whole warps.
inline int reduction_threads(int64_t length, int width) {
  const int64_t warps = divide_up(length, int64_t(4) * width * 32);
  return int(warps < 1 ? 1 : warps > kMostThreads / 32 ? kMostThreads / 32 : warps) * 32;
}

}  // namespace fastadv::cuda
