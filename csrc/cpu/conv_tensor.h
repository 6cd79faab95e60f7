// Tensors, epilogues and tasks as the host sides of all our convolutions need them.
#pragma once

#include "cpu/conv_epilogue.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace fastadv::conv {

// Images and filters are stored as floats, or as the bits of bfloat16.
template <class Stored>
constexpr at::ScalarType kDtype = std::is_same_v<Stored, float> ? at::kFloat : at::kBFloat16;
template <class Stored>
constexpr const char* kName = std::is_same_v<Stored, float> ? "float32" : "bfloat16";

template <class Stored = uint16_t>
void check_dense(const at::Tensor& t, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.scalar_type() == kDtype<Stored> && t.sizes() == sizes &&
                        t.is_contiguous(at::MemoryFormat::ChannelsLast),
                    name, " must be channels-last ", kName<Stored>, " of shape ", sizes, ", got ",
                    t.scalar_type(), " of shape ", t.sizes());
}

template <class Stored = uint16_t>
void check_packed(const at::Tensor& packed, int64_t elements) {
  TORCH_CHECK_VALUE(packed.scalar_type() == kDtype<Stored> && packed.is_contiguous() &&
                        packed.numel() == elements,
                    "packed must be ", kName<Stored>, " with ", elements,
                    " elements for these channels, got ", packed.numel());
}

// The factors of the K filters of a weight, in float32; undefined where there are none.
inline at::Tensor checked_scale(const OptionalTensor& scale, int64_t filters) {
  if (!scale) return {};
  TORCH_CHECK_VALUE(scale->numel() == filters, "scale must have shape [", filters, "], got ",
                    scale->sizes());
  return scale->to(at::kFloat).contiguous();
}

template <class Stored>
const Stored* stored(const OptionalTensor& t) {
  return t ? static_cast<const Stored*>(t->const_data_ptr()) : nullptr;
}

// The epilogue of a result, its tensors checked.
template <class Stored = uint16_t>
EpilogueOf<Stored> make_epilogue(const at::Tensor& out, const OptionalTensor& bias,
                                 const OptionalTensor& add, const OptionalTensor& mask, bool relu) {
  if (add) check_dense<Stored>(*add, "add", out.sizes());
  if (mask) check_dense<Stored>(*mask, "mask", out.sizes());
  TORCH_CHECK_VALUE(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() &&
                              bias->numel() == out.size(1)),
                    "bias must be float32 of shape [", out.size(1), "]");
  return {bias ? bias->const_data_ptr<float>() : nullptr, stored<Stored>(add), stored<Stored>(mask),
          relu};
}

// The threads among which to share this many multiplications. A thread has no fewer than take about
// as long as it takes to start the others.
inline int64_t useful_threads(int64_t multiplications) {
  constexpr int64_t kLeast = 1 << 18;
  return std::clamp<int64_t>(multiplications / kLeast, 1, at::get_num_threads());
}

// Splits `total` units into tasks of about `wanted`, the same number for every thread. Results do
// not depend on it.
inline int64_t even_share(int64_t total, int64_t wanted, int64_t threads) {
  const int64_t units = std::max<int64_t>(total, 1);
  const int64_t tasks = (units + wanted - 1) / wanted;
  const int64_t even_tasks = (tasks + threads - 1) / threads * threads;
  return (units + even_tasks - 1) / even_tasks;
}

// Runs f(first, count, scratch) over [0, total) in shares of `share`, on so many threads.
template <class Bytes, class F>
void parallel_shares(int64_t total, int64_t share, const Bytes& scratch_bytes, const F& f,
                     int64_t threads = at::get_num_threads()) {
  const int64_t tasks = (total + share - 1) / share, grain = (tasks + threads - 1) / threads;
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * share, count = std::min(share, total - first);
      f(first, count, thread_scratch(scratch_bytes(count)));
    }
  });
}

}  // namespace fastadv::conv
