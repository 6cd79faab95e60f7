// Launchers of the ops that add noise; the host sides are random_start.cpp and noisy_replay.cpp.
#pragma once

#include "cuda/arguments.h"

namespace fastadv::cuda {

// Where a sample's elements lie, in logical order: `planes` runs of `plane_size` elements.
struct Walk {
  int64_t planes, plane_size, plane_stride, element_stride;
};

struct Noise {
  void* out;
  const void* x;
  Dtype dtype;
  int64_t batch, size;
  Walk walk;
  uint64_t seed;
  const int64_t* ids;  // [B], or null for 0 .. B-1
  PerSample eps;
  double low, high;
};

enum class Ball { kLinf, kL2, kL1 };

// Elements of the workspace that a start needs.
int64_t random_start_workspace(const Noise& noise, Ball ball);

cudaError_t launch_random_start(const Noise& noise, Ball ball, int64_t* workspace,
                                cudaStream_t stream);

struct Replay {
  Noise noise;
  const void* adv;     // in the layout of noise.x
  PerSample distance;  // noise where it is larger than tau, else adv
  double tau;
};

cudaError_t launch_noisy_replay(const Replay& replay, cudaStream_t stream);

}  // namespace fastadv::cuda
