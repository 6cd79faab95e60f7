// Launcher of the momentum update; the host side is momentum_update.cpp.
#pragma once

#include "cuda/arguments.h"

namespace fastadv::cuda {

struct MomentumUpdate {
  void* momentum;
  const void* grad;
  Dtype dtype, grad_dtype;  // dtype: float or double
  int64_t batch, size;
  double decay;
  const bool* active;  // [B], or null for all
  double* workspace;   // of momentum_update_workspace() elements
};

int64_t momentum_update_workspace(const MomentumUpdate& update);

cudaError_t launch_momentum_update(const MomentumUpdate& update, cudaStream_t stream);

}  // namespace fastadv::cuda
