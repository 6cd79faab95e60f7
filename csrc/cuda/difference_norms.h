// Launchers of the norms of differences; the host side is difference_norms.cpp.
#pragma once

#include "cuda/arguments.h"

namespace fastadv::cuda {

// |u - v| of each sample, and with `norms` |w - v|, all of one layout. Addresses of tensors without
// elements are null, so that w does not tell.
struct DifferenceNorms {
  const void* u;
  const void* w;  // in u's dtype, or null; with it, v is double where u is
  const void* v;
  Dtype u_dtype, v_dtype;
  int64_t batch, size;
  bool squared;  // of one: the square of the norm
  // In the dtype of computation, double if u or v is double, else float:
  void* result;       // [B]: the norm, or the sum of both
  void* norms;        // [B, 2]: both, or null for one
  double* workspace;  // of difference_norms_workspace() elements
};

// Elements of the workspace.
int64_t difference_norms_workspace(const DifferenceNorms& a);

cudaError_t launch_difference_norms(const DifferenceNorms& a, cudaStream_t stream);

// The gradients that have a place to go.
struct DifferenceNormsBackward {
  void* out_u;  // in u's dtype, or null
  void* out_w;  // in u's dtype, or null
  void* out_v;  // in v's dtype, or null: the negative of u's
  const void* u;
  const void* w;  // null where out_w is
  const void* v;
  Dtype u_dtype, v_dtype;
  int64_t batch, size;
  bool squared;
  PerSample grad;
  const void* norms;  // of u, and w's beside it, in the dtype of computation
  int64_t norms_stride;
};

cudaError_t launch_difference_norms_backward(const DifferenceNormsBackward& a, cudaStream_t stream);

}  // namespace fastadv::cuda
