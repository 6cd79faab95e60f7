// What the sources of csrc/cuda take from CUDA's language, for a C++ compiler; included ahead of
// each .cu file. How kernels run on the CPU, says emulator.cpp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h>

#include <bit>
#include <cstdint>
#include <functional>
#include <type_traits>

// CUDA's headers are all read by now; they leave these with attributes that g++ does not know.
#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

namespace cuda_emulator {

// Runs `thread` as every thread of a grid.
void run_grid(const char* kernel, int64_t blocks, int64_t threads,
              const std::function<void()>& thread);

// launcher("kernel", blocks, threads, kernel)(arguments...) is
// kernel<<<blocks, threads, 0, stream>>>(arguments...).
template <class Kernel>
auto launcher(const char* name, int64_t blocks, int64_t threads, Kernel kernel) {
  return [=](auto... arguments) { run_grid(name, blocks, threads, [&] { kernel(arguments...); }); };
}

// Replaces `value` by that of another lane of the warp, whose number `lane_of` gives from one's
// own.
void exchange(unsigned mask, void* value, size_t size, int (*lane_of)(int lane, int distance),
              int distance);

template <class T>
T exchanged(unsigned mask, T value, int (*lane_of)(int, int), int distance) {
  static_assert(std::is_arithmetic_v<T>);
  exchange(mask, &value, sizeof(T), lane_of, distance);
  return value;
}

}  // namespace cuda_emulator

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

void __syncthreads();

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return cuda_emulator::exchanged(mask, value, [](int lane, int d) { return lane ^ d; }, distance);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  return cuda_emulator::exchanged(
      mask, value, [](int lane, int d) { return lane < d ? lane : lane - d; }, distance);
}

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
