// The losses on logits, as their host side (softmax_losses.cpp) asks for them. No header of torch.
#pragma once

#include <cstdint>

namespace fastadv {

// The memory of a call, all of it contiguous; null where it has no such tensor.
struct SoftmaxOperands {
  const void *logits, *other;       // [B, C] of the storage type
  const int64_t* y;                 // [B]
  void* losses;                     // [B, losses_per_sample], in the dtype of computation
  void *gradient, *other_gradient;  // [B, C], in the dtype of computation
  int64_t batch;
  int classes;
  int64_t losses_per_sample;  // 1 or 2
  double weight, temperature, gradient_scale;
};

// Computes the samples from `begin` to `end`.
using RunRows = void (*)(const SoftmaxOperands&, int64_t begin, int64_t end);

// The function for a kind, by its number, and the storage type T of the logits.
template <class T>
RunRows rows_of(int kind);

}  // namespace fastadv
