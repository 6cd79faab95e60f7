// Memory layouts of at::Tensor, as the host side of every backend sees them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>

#include <optional>

namespace fastadv {

using OptionalTensor = std::optional<at::Tensor>;

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

// t, which a kernel reads element by element while it writes `written`, of the same layout; a copy
// where only some of their memory is the same, as elements would be read after they were written.
inline at::Tensor apart_from(const at::Tensor& written, const at::Tensor& t) {
  const auto* to = static_cast<const char*>(written.const_data_ptr());
  const auto* from = static_cast<const char*>(t.const_data_ptr());
  const bool same = from == to && t.element_size() == written.element_size();
  const bool apart = from + t.nbytes() <= to || to + written.nbytes() <= from;
  return same || apart ? t : t.clone();
}

// Where a sample's elements lie, in logical order: `planes` runs of `plane_size` elements. One run
// for contiguous images, one per channel for channels-last ones.
struct SampleLayout {
  int64_t planes, plane_size, plane_stride, element_stride;
};

// The layout of t if its samples can be walked that way.
inline std::optional<SampleLayout> sample_layout(const at::Tensor& t) {
  const int64_t size = sample_size(t);
  if (t.is_contiguous()) return SampleLayout{1, size, 0, 1};
  if (t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    return SampleLayout{t.size(1), t.size(2) * t.size(3), 1, t.size(1)};
  }
  return std::nullopt;
}

}  // namespace fastadv
