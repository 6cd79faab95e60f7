// Arguments that the host side passes to a kernel launcher. No torch header is included, so that
// launchers compile with any torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastadv::cuda {

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

// One number per sample: the sample's own where there are values, else the same for all.
struct PerSample {
  double number;
  const void* values;
  Dtype dtype;
  int64_t stride;
};

// How many blocks share a sample in a reduction, and how many elements each takes. A function of
// the sample's size alone, so that the batch around a sample does not change its sums.
struct Parts {
  int64_t count, length;
};

inline Parts parts_of(int64_t size) {
  constexpr int64_t kOneBlock = 32768, kPart = 16384, kMost = 64, kMultiple = 16;
  if (size <= kOneBlock) return {1, size};
  const int64_t even = (size + kMost - 1) / kMost;
  int64_t length = (even + kMultiple - 1) / kMultiple * kMultiple;
  if (length < kPart) length = kPart;
  return {(size + length - 1) / length, length};
}

}  // namespace fastadv::cuda
