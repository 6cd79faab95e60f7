// Host side of the CUDA ops: at::Tensor as the launchers take it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>

#include "checks.h"
#include "cuda/arguments.h"
#include "layout.h"

namespace fastadv::cuda {

inline Dtype dtype_of(const at::Tensor& t, const char* argument) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    default:
      TORCH_CHECK_TYPE(false, argument, " must be float32, float64, bfloat16 or float16, got ",
                       t.scalar_type());
  }
}

// The dtype in which tensors are computed: float64 if one of them is, else float32.
inline at::ScalarType compute_dtype(std::initializer_list<at::Tensor> tensors) {
  for (const at::Tensor& t : tensors) {
    if (t.scalar_type() == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

// One number per sample, read from a tensor [B] of any float dtype and stride.
inline PerSample per_sample(const at::Tensor& values, const char* name, const at::Tensor& like) {
  check_per_sample(values, name, like);
  return {0, values.const_data_ptr(), dtype_of(values, name), values.stride(0)};
}

inline PerSample per_sample(double number, const OptionalTensor& values, const char* name,
                            const at::Tensor& like) {
  if (values) return per_sample(*values, name, like);
  return {number, nullptr, Dtype::kDouble, 0};
}

// A workspace of `count` elements, from torch's allocator so that a graph can capture it.
inline at::Tensor workspace(int64_t count, at::ScalarType dtype, const at::Tensor& like) {
  return at::empty({count}, like.options().dtype(dtype).memory_format(std::nullopt));
}

// A gradient in its argument's layout, and the tensor in the kernel's layout that is written to.
struct Gradient {
  at::Tensor result, written;

  Gradient() = default;
  Gradient(const at::Tensor& argument, const at::Tensor& like) : result(at::empty_like(argument)) {
    written = same_layout(result, like)
                  ? result
                  : at::empty_like(like, result.options().memory_format(std::nullopt));
  }

  void* address() const { return written.defined() ? written.data_ptr() : nullptr; }

  // The result, or an empty tensor in its place.
  at::Tensor finished(const at::Tensor& argument) const {
    if (!result.defined()) return workspace(0, argument.scalar_type(), argument);
    return result.is_same(written) ? result : result.copy_(written);
  }
};

// The queue that torch uses at the moment on the current device.
inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream(); }

}  // namespace fastadv::cuda
