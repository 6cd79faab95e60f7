// Tensors of one dtype and layout, and sums over each sample in fixed parts, for all ops on batches
// of features.
#pragma once

#include <ATen/ops/empty.h>

#include <array>
#include <vector>

#include "cpu/sum.h"
#include "cpu/tensor.h"

namespace fastadv {

// Elements summed by one task; fixed, so that threads do not change the sum.
constexpr int64_t kPart = 16384;

struct Features {
  const char* name;
  const at::Tensor& tensor;
};

inline at::ScalarType compute_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_batched(const Features& f) {
  TORCH_CHECK_VALUE(f.tensor.dim() > 0, f.name,
                    " must have a batch axis, got a tensor without axes");
}

// The dtype of all features if they share one, else the one in which they are computed.
template <size_t N>
at::ScalarType common_dtype(const Features (&features)[N]) {
  const auto first = features[0].tensor.scalar_type();
  bool same = true, wide = false;
  for (const Features& f : features) {
    same = same && f.tensor.scalar_type() == first;
    wide = wide || f.tensor.scalar_type() == at::kDouble;
  }
  return same ? first : wide ? at::kDouble : at::kFloat;
}

// Features of one shape as batch-major tensors of one dtype and layout.
template <size_t N>
std::array<at::Tensor, N> aligned(const Features (&features)[N]) {
  const Features& first = features[0];
  check_batched(first);
  for (const Features& f : features) check_shape(f.tensor, f.name, first.tensor, first.name);
  const auto dtype = common_dtype(features);
  std::array<at::Tensor, N> result;
  result[0] = batch_major(first.tensor.to(dtype));
  for (size_t i = 1; i < N; ++i) result[i] = in_layout_of(features[i].tensor.to(dtype), result[0]);
  return result;
}

// One contiguous number per sample for the backward pass, in the dtype of computation.
inline at::Tensor per_sample_values(const at::Tensor& t, const char* name, at::IntArrayRef shape,
                                    at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
  return t.to(dtype).contiguous();
}

// A gradient in the dtype and layout of its argument, and the aligned tensor it is computed in: the
// same one where it can be.
struct Gradient {
  at::Tensor result, computed;

  at::Tensor finished() const { return result.is_same(computed) ? result : result.copy_(computed); }
};

inline Gradient gradient_for(const at::Tensor& argument, const at::Tensor& aligned) {
  const at::Tensor result = at::empty_like(argument);
  const bool direct = result.scalar_type() == aligned.scalar_type() && same_layout(result, aligned);
  return {result, direct ? result : at::empty_like(aligned)};
}

// An empty tensor, which stands for a gradient that is not asked for.
inline Gradient no_gradient(const at::Tensor& argument) {
  const at::Tensor nothing = at::empty({0}, argument.options().memory_format(std::nullopt));
  return {nothing, nothing};
}

// N sums over each sample; sums_of(at, count) returns those of `count` elements from element `at`
// of the batch on.
template <size_t N, class F>
std::vector<std::array<double, N>> sums_of_samples(int64_t batch, int64_t size, const F& sums_of) {
  const int64_t parts = (size + kPart - 1) / kPart;
  std::vector<std::array<double, N>> partial(batch * parts), result(batch);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(size, kPart)));
  at::parallel_for(0, batch * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % parts * kPart;
      partial[i] = sums_of(i / parts * size + first, std::min(kPart, size - first));
    }
  });
  for (int64_t i = 0; i < batch * parts; ++i) {
    for (size_t k = 0; k < N; ++k) result[i / parts][k] += partial[i][k];
  }
  return result;
}

}  // namespace fastadv
