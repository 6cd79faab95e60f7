// Host side of the norms of differences on CUDA devices.
#include "cuda/difference_norms.h"

#include <tuple>

#include "cuda/tensor.h"

namespace fastadv::cuda {
namespace {

// Fills `result` and, where there is a `w`, `norms`. w has u's dtype; both may be undefined.
void norms_into(const at::Tensor& result, const at::Tensor& norms, const at::Tensor& u,
                const at::Tensor& w, const at::Tensor& v, bool squared) {
  const at::Tensor a = batch_major(u), center = in_layout_of(v, a);
  const at::Tensor b = w.defined() ? in_layout_of(w, a) : w;
  DifferenceNorms arguments{a.const_data_ptr(),
                            b.defined() ? b.const_data_ptr() : nullptr,
                            center.const_data_ptr(),
                            dtype_of(u, "u"),
                            dtype_of(v, "v"),
                            u.size(0),
                            sample_size(u),
                            squared,
                            result.data_ptr(),
                            norms.defined() ? norms.data_ptr() : nullptr,
                            nullptr};
  at::Tensor space;
  if (const int64_t needed = difference_norms_workspace(arguments)) {
    space = workspace(needed, at::kDouble, u);
    arguments.workspace = space.data_ptr<double>();
  }
  C10_CUDA_CHECK(launch_difference_norms(arguments, current_stream()));
}

// u and w, where it is defined, share a dtype; norms hold w's beside u's.
void gradients_into(const Gradient& of_u, const Gradient& of_w, const Gradient& of_v,
                    const at::Tensor& grad, const at::Tensor& u, const at::Tensor& w,
                    const at::Tensor& v, const at::Tensor& norms, bool squared) {
  const at::Tensor a = batch_major(u), center = in_layout_of(v, a);
  const at::Tensor b = w.defined() ? in_layout_of(w, a) : w;
  const DifferenceNormsBackward arguments{of_u.address(),
                                          of_w.address(),
                                          of_v.address(),
                                          a.const_data_ptr(),
                                          b.defined() ? b.const_data_ptr() : nullptr,
                                          center.const_data_ptr(),
                                          dtype_of(u, "u"),
                                          dtype_of(v, "v"),
                                          u.size(0),
                                          sample_size(u),
                                          squared,
                                          per_sample(grad, "grad", u),
                                          norms.const_data_ptr(),
                                          norms.stride(0)};
  C10_CUDA_CHECK(launch_difference_norms_backward(arguments, current_stream()));
}

at::Tensor euclidean_distance(const at::Tensor& u, const at::Tensor& v, bool squared) {
  const c10::cuda::CUDAGuard guard(u.device());
  check_batched(u, "u");
  check_shape(v, "v", u, "u");
  const at::Tensor distance = workspace(u.size(0), compute_dtype({u, v}), u);
  norms_into(distance, {}, u, {}, v, squared);
  return distance;
}

std::tuple<at::Tensor, at::Tensor> euclidean_distance_backward(
    const at::Tensor& grad, const at::Tensor& u, const at::Tensor& v, const at::Tensor& distance,
    bool squared, bool want_u, bool want_v) {
  const c10::cuda::CUDAGuard guard(u.device());
  check_batched(u, "u");
  check_shape(v, "v", u, "u");
  check_per_sample(distance, "distance", u);
  const at::Tensor a = batch_major(u);
  const Gradient of_u = want_u ? Gradient(u, a) : Gradient();
  const Gradient of_v = want_v ? Gradient(v, a) : Gradient();
  if (want_u || want_v) {
    const at::Tensor norms = distance.to(compute_dtype({u, v}));
    gradients_into(of_u, {}, of_v, grad, a, {}, v, norms, squared);
  }
  return {of_u.finished(u), of_v.finished(v)};
}

void check_features(const at::Tensor& f_adv, const at::Tensor& f_clean,
                    const at::Tensor& f_vanilla) {
  check_batched(f_adv, "f_adv");
  check_shape(f_clean, "f_clean", f_adv, "f_adv");
  check_shape(f_vanilla, "f_vanilla", f_adv, "f_adv");
}

// The features as the kernels take them: f_adv and f_clean of one dtype, and all float64 if one is.
struct Dtypes {
  at::ScalarType compute, trained, vanilla;

  Dtypes(const at::Tensor& f_adv, const at::Tensor& f_clean, const at::Tensor& f_vanilla)
      : compute(compute_dtype({f_adv, f_clean, f_vanilla})) {
    const bool wide = compute == at::kDouble;
    const bool same = f_adv.scalar_type() == f_clean.scalar_type();
    trained = wide || !same ? compute : f_adv.scalar_type();
    vanilla = wide ? compute : f_vanilla.scalar_type();
  }
};

std::tuple<at::Tensor, at::Tensor> vanilla_feature_distillation(const at::Tensor& f_adv,
                                                                const at::Tensor& f_clean,
                                                                const at::Tensor& f_vanilla) {
  const c10::cuda::CUDAGuard guard(f_adv.device());
  check_features(f_adv, f_clean, f_vanilla);
  const Dtypes dtypes(f_adv, f_clean, f_vanilla);
  const at::Tensor loss = workspace(f_adv.size(0), dtypes.compute, f_adv);
  const at::Tensor norms = at::empty({f_adv.size(0), 2}, loss.options());
  norms_into(loss, norms, f_adv.to(dtypes.trained), f_clean.to(dtypes.trained),
             f_vanilla.to(dtypes.vanilla), false);
  return {loss, norms};
}

std::tuple<at::Tensor, at::Tensor> vanilla_feature_distillation_backward(
    const at::Tensor& grad, const at::Tensor& f_adv, const at::Tensor& f_clean,
    const at::Tensor& f_vanilla, const at::Tensor& norms, bool want_adv, bool want_clean) {
  const c10::cuda::CUDAGuard guard(f_adv.device());
  check_features(f_adv, f_clean, f_vanilla);
  TORCH_CHECK_VALUE(norms.sizes() == at::IntArrayRef({f_adv.size(0), 2}), "norms must have shape [",
                    f_adv.size(0), ", 2], got ", norms.sizes());
  check_device(norms, "norms", f_adv);
  const Dtypes dtypes(f_adv, f_clean, f_vanilla);
  const at::Tensor lengths = norms.to(dtypes.compute).contiguous();
  const at::Tensor vanilla = f_vanilla.to(dtypes.vanilla);
  if (want_adv && want_clean) {
    const at::Tensor adv = f_adv.to(dtypes.trained), clean = f_clean.to(dtypes.trained);
    const at::Tensor a = batch_major(adv);
    const Gradient of_adv(adv, a), of_clean(clean, a);
    gradients_into(of_adv, of_clean, {}, grad, a, clean, vanilla, lengths, false);
    return {of_adv.finished(adv).to(f_adv.scalar_type()),
            of_clean.finished(clean).to(f_clean.scalar_type())};
  }
  // One alone: the other is not read.
  const auto gradient_in = [&](bool wanted, const at::Tensor& f, int64_t which) {
    if (!wanted) return Gradient().finished(f);
    const at::Tensor features = f.to(dtypes.trained), a = batch_major(features);
    const Gradient gradient(features, a);
    gradients_into(gradient, {}, {}, grad, a, {}, vanilla, lengths.select(1, which), false);
    return gradient.finished(features).to(f.scalar_type());
  };
  return {gradient_in(want_adv, f_adv, 0), gradient_in(want_clean, f_clean, 1)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CUDA, m) {
  m.impl("euclidean_distance", &euclidean_distance);
  m.impl("euclidean_distance_backward", &euclidean_distance_backward);
  m.impl("vanilla_feature_distillation", &vanilla_feature_distillation);
  m.impl("vanilla_feature_distillation_backward", &vanilla_feature_distillation_backward);
}

}  // namespace fastadv::cuda
