// csrc/cpu/conv_gather_float.h for AVX2. Kept apart from torch's headers, so that none of their
// inline functions is compiled for a processor that may not be there.
#include "cpu/conv_gather_float.h"

#if defined(__x86_64__) && defined(__linux__)
#define FASTADV_LEVEL __attribute__((target("avx2,bmi,bmi2,fma")))
#define FASTADV_LEVEL_INLINE inline __attribute__((target("avx2,bmi,bmi2,fma"), always_inline))
#include "cpu/vector_avx2.h"
#include "cpu/vector_finish.h"

namespace fastadv::conv_gather {
constexpr int kVectors = 2;  // 6 x 2 sums fill 12 of the 16 registers
constexpr int kSums = 10;    // of few results: with inputs and filters they fill 13 of them
}  // namespace fastadv::conv_gather
#include "cpu/conv_gather_few_inner.h"

namespace fastadv::conv_gather {
const FloatKernel kFloatAvx2{kLanes, convolve, convolve_from_few, convolve_to_few};
}
#else
namespace fastadv::conv_gather {
const FloatKernel kFloatAvx2{};
}
#endif
