// Host side of the CPU ops: layouts, dtype dispatch and argument checks on at::Tensor.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <optional>

#include "cpu/simd.h"

namespace fastadv {

using OptionalTensor = std::optional<at::Tensor>;

// Calls f with a value of the storage type: f(float{}), f(BFloat16{}), ...
template <class F>
void dispatch_float(at::ScalarType dtype, const char* argument, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(BFloat16{});
    case at::kHalf:
      return f(Half{});
    default:
      TORCH_CHECK_TYPE(false, argument, " must be float32, float64, bfloat16 or float16, got ",
                       dtype);
  }
}

template <class T>
T* data(const at::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Elements of one sample.
inline int64_t sample_size(const at::Tensor& t) { return t.size(0) ? t.numel() / t.size(0) : 0; }

// True where memory is one dense run of samples, whatever the order of the inner axes.
inline bool is_batch_major(const at::Tensor& t) {
  return t.is_non_overlapping_and_dense() && (t.size(0) <= 1 || t.stride(0) == sample_size(t));
}

inline bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

inline at::Tensor batch_major(const at::Tensor& t) {
  return is_batch_major(t) ? t : t.contiguous();
}

// t in the memory layout of a batch-major tensor of the same shape; t itself where it has it
// already.
inline at::Tensor in_layout_of(const at::Tensor& t, const at::Tensor& like) {
  if (same_layout(t, like)) return t;
  return at::empty_strided(t.sizes(), like.strides(), t.options()).copy_(t);
}

inline void check_shape(const at::Tensor& t, const char* name, const at::Tensor& like,
                        const char* like_name) {
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), name, " must have the shape of ", like_name, ", ",
                    like.sizes(), ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
}

// One number per sample: either the same for all or read from a tensor [B].
class PerSample {
 public:
  PerSample(double number, const OptionalTensor& values, int64_t batch, const char* name)
      : number_(number) {
    if (!values) return;
    TORCH_CHECK_VALUE(values->sizes() == at::IntArrayRef{batch}, name, " must have shape [", batch,
                      "], got ", values->sizes());
    values_ = values->to(at::kDouble).contiguous();
  }
  double operator[](int64_t sample) const {
    return values_.defined() ? values_.const_data_ptr<double>()[sample] : number_;
  }
  bool varies() const { return values_.defined(); }

 private:
  double number_;
  at::Tensor values_;
};

// Runs f(sample, begin, end) over the samples' elements in parallel; begin and end count within the
// sample.
template <class F>
void parallel_over_samples(int64_t batch, int64_t size, const F& f) {
  if (batch == 0 || size == 0) return;
  at::parallel_for(0, batch * size, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin / size; sample * size < end; ++sample) {
      const int64_t start = sample * size;
      f(sample, std::max(begin, start) - start, std::min(end, start + size) - start);
    }
  });
}

}  // namespace fastadv
