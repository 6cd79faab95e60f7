// The epilogue of our convolutions: what is done with a result before it is stored.
#pragma once

#include <cstdint>

namespace fastadv::conv {

constexpr int kWide = 64;  // output channels computed together: four vectors of 16 floats
constexpr int kVector = 16;

// How many of the remaining rows to multiply together, at most `most`: 6 x 4 sums fill the
// registers; a remainder is spread so that no group is tiny.
inline int64_t next_rows(int64_t remaining, int64_t most = 6) {
  const int64_t groups = (remaining + most - 1) / most;
  return (remaining + groups - 1) / groups;
}

// The steps of an epilogue, in this order: + bias[c], + add, max(0, .), 0 where mask <= 0. Pointers
// may be null. `add` and `mask` have the memory layout of the result.
template <class Stored>
struct EpilogueOf {
  const float* bias;
  const Stored* add;
  const Stored* mask;
  bool relu;
};
using Epilogue = EpilogueOf<uint16_t>;  // of bfloat16

// Whether this processor has AVX512-BF16.
bool supported();

// Output channels as filters are packed: rounded up to whole vectors.
constexpr int64_t padded(int64_t channels) { return (channels + kVector - 1) / kVector * kVector; }

}  // namespace fastadv::conv
