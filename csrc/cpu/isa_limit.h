// The environment variable FASTADV_MAX_CPU_ISA: the code then runs as on a processor that has no
// more than these instructions. Python checks its value (fastadv/engine/precision.py).
#pragma once

#include <cstdlib>
#include <cstring>

namespace fastadv {

enum class IsaLimit { kAvx2, kAvx512, kNone };

inline IsaLimit isa_limit() {
  const char* name = std::getenv("FASTADV_MAX_CPU_ISA");
  if (name && std::strcmp(name, "AVX2") == 0) return IsaLimit::kAvx2;
  return name && std::strcmp(name, "AVX512") == 0 ? IsaLimit::kAvx512 : IsaLimit::kNone;
}

}  // namespace fastadv
