// Launchers of the angular distance; the host side is angular_distance.cpp.
#pragma once

#include "cuda/arguments.h"

namespace fastadv::cuda {

struct AngularDistance {
  const void* u;
  const void* v;
  Dtype u_dtype, v_dtype;
  int64_t batch, size;
  void* distance;  // [B] in the dtype of computation, double if u or v is double, else float
  void* moments;   // [B, 3] in the dtype of computation, or null
  bool* far;       // [B], distance > tau, or null
  double tau;
  double* workspace;  // of angular_distance_workspace() elements
};

// Elements of the workspace.
int64_t angular_distance_workspace(const AngularDistance& a);

cudaError_t launch_angular_distance(const AngularDistance& a, cudaStream_t stream);

struct AngularDistanceBackward {
  void* out_u;  // in u's dtype, or null
  void* out_v;  // in v's dtype, or null
  const void* u;
  const void* v;
  Dtype u_dtype, v_dtype;
  int64_t batch, size;
  PerSample grad;
  const void* moments;  // [B, 3] contiguous, in the dtype of computation
};

cudaError_t launch_angular_distance_backward(const AngularDistanceBackward& a, cudaStream_t stream);

}  // namespace fastadv::cuda
