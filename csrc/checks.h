// Checks of the ops' arguments on the host, the same for CPUs and for CUDA devices. The public
// functions in Python check first; these are for calls of torch.ops.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "layout.h"

namespace fastadv {

inline void check_batched(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() > 0, name, " must have a batch axis, got a tensor without axes");
}

inline void check_device(const at::Tensor& t, const char* name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " must be on the device ", like.device(),
                    ", got ", t.device());
}

inline void check_shape(const at::Tensor& t, const char* name, const at::Tensor& like,
                        const char* like_name) {
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), name, " must have the shape of ", like_name, ", ",
                    like.sizes(), ", got ", t.sizes());
  check_device(t, name, like);
}

inline void check_dtype(const at::Tensor& t, const char* name, const at::Tensor& like,
                        const char* like_name) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must have the dtype of ",
                   like_name, ", ", like.scalar_type(), ", got ", t.scalar_type());
}

inline void check_per_sample(const at::Tensor& t, const char* name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.sizes() == like.sizes().slice(0, 1), name, " must have shape [", like.size(0),
                    "], got ", t.sizes());
  check_device(t, name, like);
}

inline void check_norm(c10::string_view norm) {
  TORCH_CHECK_VALUE(norm == "linf" || norm == "l2" || norm == "l1",
                    "norm must be one of linf, l2, l1, got ", norm);
}

// int64 sample ids, contiguous; undefined for the default.
inline at::Tensor checked_ids(const OptionalTensor& ids, const at::Tensor& like) {
  if (!ids) return {};
  TORCH_CHECK_VALUE(ids->scalar_type() == at::kLong, "sample_ids must be int64, got ",
                    ids->scalar_type());
  check_per_sample(*ids, "sample_ids", like);
  return ids->contiguous();
}

// bool per sample, contiguous; undefined for all.
inline at::Tensor checked_active(const OptionalTensor& active, const at::Tensor& like) {
  if (!active) return {};
  TORCH_CHECK_TYPE(active->scalar_type() == at::kBool, "active must be a bool tensor, got ",
                   active->scalar_type());
  check_per_sample(*active, "active", like);
  return active->contiguous();
}

inline void check_momentum(const at::Tensor& momentum, const at::Tensor& grad) {
  check_batched(momentum, "momentum");
  TORCH_CHECK_TYPE(momentum.scalar_type() == at::kFloat || momentum.scalar_type() == at::kDouble,
                   "momentum must be float32 or float64, got ", momentum.scalar_type());
  check_shape(grad, "grad", momentum, "momentum");
}

inline void check_replay(const at::Tensor& x, const at::Tensor& adv, const at::Tensor& distance) {
  check_batched(x, "x");
  check_shape(adv, "adv", x, "x");
  check_dtype(adv, "adv", x, "x");
  check_per_sample(distance, "distance", x);
}

}  // namespace fastadv
