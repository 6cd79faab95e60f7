// Host side of the angular distance on CUDA devices.
#include "cuda/angular_distance.h"

#include <tuple>

#include "cuda/tensor.h"

namespace fastadv::cuda {
namespace {

void check_pair(const at::Tensor& u, const at::Tensor& v) {
  check_batched(u, "u");
  check_shape(v, "v", u, "u");
}

// `moments` or `far` may be undefined.
void distance_into(const at::Tensor& distance, const at::Tensor& moments, const at::Tensor& far,
                   const at::Tensor& u, const at::Tensor& v, double tau) {
  const at::Tensor a = batch_major(u), b = in_layout_of(v, a);
  AngularDistance arguments{a.const_data_ptr(),
                            b.const_data_ptr(),
                            dtype_of(u, "u"),
                            dtype_of(v, "v"),
                            u.size(0),
                            sample_size(u),
                            distance.data_ptr(),
                            moments.defined() ? moments.data_ptr() : nullptr,
                            far.defined() ? far.data_ptr<bool>() : nullptr,
                            tau,
                            nullptr};
  at::Tensor space;
  if (const int64_t needed = angular_distance_workspace(arguments)) {
    space = workspace(needed, at::kDouble, u);
    arguments.workspace = space.data_ptr<double>();
  }
  C10_CUDA_CHECK(launch_angular_distance(arguments, current_stream()));
}

std::tuple<at::Tensor, at::Tensor> angular_distance(const at::Tensor& u, const at::Tensor& v) {
  const c10::cuda::CUDAGuard guard(u.device());
  check_pair(u, v);
  const at::Tensor distance = workspace(u.size(0), compute_dtype({u, v}), u);
  const at::Tensor moments = at::empty({u.size(0), 3}, distance.options());
  distance_into(distance, moments, {}, u, v, 0);
  return {distance, moments};
}

std::tuple<at::Tensor, at::Tensor> replay_mask(const at::Tensor& u, const at::Tensor& v,
                                               double tau) {
  const c10::cuda::CUDAGuard guard(u.device());
  check_pair(u, v);
  const at::Tensor distance = workspace(u.size(0), compute_dtype({u, v}), u);
  const at::Tensor far = workspace(u.size(0), at::kBool, u);
  distance_into(distance, {}, far, u, v, tau);
  return {distance, far};
}

std::tuple<at::Tensor, at::Tensor> angular_distance_backward(const at::Tensor& grad,
                                                             const at::Tensor& u,
                                                             const at::Tensor& v,
                                                             const at::Tensor& moments, bool want_u,
                                                             bool want_v) {
  const c10::cuda::CUDAGuard guard(u.device());
  check_pair(u, v);
  TORCH_CHECK_VALUE(moments.sizes() == at::IntArrayRef({u.size(0), 3}), "moments must have shape [",
                    u.size(0), ", 3], got ", moments.sizes());
  check_device(moments, "moments", u);
  const at::Tensor a = batch_major(u), b = in_layout_of(v, a);
  const at::Tensor sums = moments.to(compute_dtype({u, v})).contiguous();
  const Gradient of_u = want_u ? Gradient(u, a) : Gradient();
  const Gradient of_v = want_v ? Gradient(v, a) : Gradient();
  if (want_u || want_v) {
    const AngularDistanceBackward arguments{of_u.address(),
                                            of_v.address(),
                                            a.const_data_ptr(),
                                            b.const_data_ptr(),
                                            dtype_of(u, "u"),
                                            dtype_of(v, "v"),
                                            u.size(0),
                                            sample_size(u),
                                            per_sample(grad, "grad", u),
                                            sums.const_data_ptr()};
    C10_CUDA_CHECK(launch_angular_distance_backward(arguments, current_stream()));
  }
  return {of_u.finished(u), of_v.finished(v)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CUDA, m) {
  m.impl("angular_distance", &angular_distance);
  m.impl("angular_distance_backward", &angular_distance_backward);
  m.impl("replay_mask", &replay_mask);
}

}  // namespace fastadv::cuda
