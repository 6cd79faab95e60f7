// The Python module fastadv._C. Importing it runs the TORCH_LIBRARY_IMPL blocks of the other files;
// its one function tells how it was built.
#include <pybind11/pybind11.h>

#include "cpu/simd.h"

namespace {

const char* simd_level() {
#if FASTADV_HAS_CLONES
  __builtin_cpu_init();
  if (fastadv::has_avx512()) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "x86-64 (SSE2)";
#elif defined(__aarch64__)
  return "aarch64 (NEON)";
#else
  return "compiler baseline";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = FASTADV_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["simd"] = simd_level();
#ifdef FASTADV_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastadv; they register themselves with torch.ops.fastadv.";
  m.def("build_info", &build_info,
        "What the module was built with and which SIMD level this processor gets.");
}
