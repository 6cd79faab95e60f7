// Launchers of the PGD step; the host side is pgd_step.cpp.
#pragma once

#include "cuda/arguments.h"

namespace fastadv::cuda {

struct PgdStep {
  void* out;  // may be adv
  const void* adv;
  const void* grad;
  const void* x;
  Dtype dtype, grad_dtype;
  int64_t batch, size;
  PerSample eps, alpha;
  double low, high;
  double sparsity;
  const bool* active;  // [B], or null for all
  int64_t* counts;     // [2]: to add how many gradient elements are zero, not finite; or null
  double* workspace;   // of pgd_step_l2_workspace() elements
};

// Elements of the workspace that the l2 step needs.
int64_t pgd_step_l2_workspace(const PgdStep& step);

cudaError_t launch_pgd_step_linf(const PgdStep& step, cudaStream_t stream);
cudaError_t launch_pgd_step_l2(const PgdStep& step, cudaStream_t stream);
cudaError_t launch_pgd_step_l1(const PgdStep& step, cudaStream_t stream);

}  // namespace fastadv::cuda
