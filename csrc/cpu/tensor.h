// Host side of the CPU ops: dtype dispatch, numbers per sample and threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "layout.h"

namespace fastadv {

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

// One number per sample: either the same for all or read from a tensor [B].
class PerSample {
 public:
  PerSample(double number, const OptionalTensor& values, const at::Tensor& like, const char* name)
      : number_(number) {
    if (!values) return;
    check_per_sample(*values, name, like);
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

// Runs f(sample, begin, end) over the samples' elements in parallel, at least `grain` of them per
// task; begin and end count within the sample.
template <class F>
void parallel_over_samples(int64_t batch, int64_t size, const F& f, int64_t grain = kGrain) {
  if (batch == 0 || size == 0) return;
  at::parallel_for(0, batch * size, grain, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin / size; sample * size < end; ++sample) {
      const int64_t start = sample * size;
      f(sample, std::max(begin, start) - start, std::min(end, start + size) - start);
    }
  });
}

}  // namespace fastadv
