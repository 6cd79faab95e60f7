// The host side of all ops that add noise.
#pragma once

#include "cuda/noise.h"
#include "cuda/tensor.h"

namespace fastadv::cuda {

// The tensors of such an op, in a layout that its kernels can walk, and their launcher's argument.
struct NoiseTensors {
  at::Tensor out, from, to, ids;  // the kernels write `to`
  Noise noise;

  NoiseTensors(const at::Tensor& x, double eps, const OptionalTensor& eps_per_sample, double low,
               double high, int64_t seed, const OptionalTensor& sample_ids) {
    check_batched(x, "x");
    ids = checked_ids(sample_ids, x);
    out = at::empty_like(x);
    auto layout = sample_layout(x);
    if (layout && !same_layout(out, x)) layout.reset();
    from = layout ? x : x.contiguous();
    to = layout ? out : at::empty_like(from);
    const int64_t size = sample_size(x);
    const SampleLayout walk = layout.value_or(SampleLayout{1, size, 0, 1});
    noise = {to.data_ptr(),
             from.const_data_ptr(),
             dtype_of(x, "x"),
             x.size(0),
             size,
             {walk.planes, walk.plane_size, walk.plane_stride, walk.element_stride},
             uint64_t(seed),
             ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr,
             per_sample(eps, eps_per_sample, "eps_per_sample", x),
             low,
             high};
  }

  at::Tensor result() const { return to.is_same(out) ? out : out.copy_(to); }
};

}  // namespace fastadv::cuda
