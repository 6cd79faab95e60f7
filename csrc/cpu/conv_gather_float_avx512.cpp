// csrc/cpu/conv_gather_float.h for AVX-512. Kept apart from torch's headers, so that none of their
// inline functions is compiled for a processor that may not be there.
#include "cpu/conv_gather_float.h"

#if defined(__x86_64__) && defined(__linux__)
#define FASTADV_LEVEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define FASTADV_LEVEL_INLINE \
  inline __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"), always_inline))
#include "cpu/vector_avx512.h"
#include "cpu/vector_finish.h"

namespace fastadv::conv_gather {
constexpr int kVectors = 4;  // 6 x 4 sums fill 24 of the 32 registers
constexpr int kSums = 20;    // of few results: with inputs and filters they fill 26 of them
}  // namespace fastadv::conv_gather
#include "cpu/conv_gather_few_inner.h"

namespace fastadv::conv_gather {
const FloatKernel kFloatAvx512{kLanes, convolve, convolve_from_few, convolve_to_few};
}
#else
namespace fastadv::conv_gather {
const FloatKernel kFloatAvx512{};
}
#endif
