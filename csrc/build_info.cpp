// Versions and instruction set of the compiled part, for `fastadv info`, which reads them with
// ctypes: the library includes no header of Python, so that one file works with every version of
// Python. Loading the library runs the TORCH_LIBRARY_IMPL blocks of the other files.
#include "cpu/simd.h"

#define FASTADV_EXPORT extern "C" __attribute__((visibility("default")))

FASTADV_EXPORT const char* fastadv_torch() { return FASTADV_TORCH_VERSION; }

FASTADV_EXPORT const char* fastadv_compiler() {
#ifdef __clang__
  return __VERSION__;
#else
  return "GCC " __VERSION__;
#endif
}

FASTADV_EXPORT const char* fastadv_simd() {
#if defined(__aarch64__)
  return "aarch64 (NEON)";
#else
  switch (fastadv::kSimdLevel) {
    case fastadv::SimdLevel::kAvx512:
      return "x86-64-v4 (AVX-512)";
    case fastadv::SimdLevel::kAvx2:
      return "x86-64-v3 (AVX2)";
    default:
      return "compiler baseline";
  }
#endif
}

FASTADV_EXPORT int fastadv_cuda() {
#ifdef FASTADV_WITH_CUDA
  return 1;
#else
  return 0;
#endif
}
