// Kernels of the pretended GPU: those of the CPU, on the same memory.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/from_blob.h>

#include <vector>

#include "memory.h"

namespace rehearsal {

inline const c10::Device kCuda(c10::DeviceType::CUDA, 0);

// A kernel with its arguments as tensors of the CPU, which do not keep their memory alive.
struct Launch {
  c10::OperatorHandle op;
  torch::jit::Stack arguments;
  std::vector<Use> uses;
  std::vector<std::pair<size_t, at::Tensor>> results;  // by place: new tensors that it makes
};

// What torch.cuda.CUDAGraph stands for.
struct Graph : Recording {
  std::vector<Launch> launches;
  void replay() const;
};

// Runs an operator on tensors of the pretended GPU.
void launch(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// A tensor of a device on a storage, with the geometry of another.
at::Tensor make_tensor(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like);
void set_geometry(const at::Tensor& t, const at::Tensor& like);

// The generator of the CPU that makes the random numbers of one of the device.
at::Generator host_generator(const at::Generator& generator);
const at::Generator& default_generator();

}  // namespace rehearsal
