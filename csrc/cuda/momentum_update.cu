// The accumulated gradient of momentum attacks in CUDA C++. Definition:
// fastadv/ops/momentum_update.py.
//
// This op has a CUDA C++ and a Triton version, for the reason in pgd_step.cu.
#include "cuda/launch.cuh"
#include "cuda/momentum_update.h"

namespace fastadv::cuda {
namespace {

// Sum of magnitudes, in all threads of the block.
template <class G>
__device__ double l1_norm(const G* grad, int64_t length, bool vectors) {
  double sum[1] = {0};
  for_elements<kVector<G>, 2>(length, vectors, [&](int64_t i, auto count) {
    const auto g = load_vector<count.value>(grad + i);
#pragma unroll
    for (int k = 0; k < count.value; ++k) sum[0] += fabs(double(load(g.at[k])));
  });
  combine_block(sum, Add{});
  return sum[0];
}

// The factor of the gradient; 0 if the gradient adds nothing.
template <class C>
__device__ double factor_of(double norm) {
  const double factor = 1 / norm;
  if (!(norm > 0 && isfinite(norm) && isfinite(factor))) return 0;
  return std::is_same_v<C, float> ? rounded_to_float_precision(factor) : factor;
}

template <class C, class G>
__device__ void update_block(C* momentum, const G* grad, int64_t length, bool vectors, C decay,
                             double factor) {
  for_elements<kVector<C, G>>(length, vectors, [&](int64_t i, auto count) {
    constexpr int kCount = count.value;
    auto m = load_vector<kCount>(momentum + i);
    const auto g = load_vector<kCount>(grad + i);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const C added = factor == 0 ? C(0) : C(double(load(g.at[k])) * factor);
      m.at[k] = decay * m.at[k] + added;
    }
    store_vector(momentum + i, m);
  });
}

// One block per sample; its second pass reads what the first left in the caches.
template <class C, class G>
__global__ void __launch_bounds__(kMostThreads)
    update_samples(C* momentum, const G* grad, int64_t size, bool vectors, double decay,
                   const bool* active) {
  const int64_t sample = blockIdx.x, at = sample * size;
  if (!is_active(active, sample)) return;
  const double factor = factor_of<C>(l1_norm(grad + at, size, vectors));
  update_block(momentum + at, grad + at, size, vectors, C(decay), factor);
}

// The parts of large samples: their norms first, then the update.
template <class G>
__global__ void __launch_bounds__(kMostThreads)
    norms_of_parts(double* norms, const G* grad, int64_t size, bool vectors, Parts parts,
                   const bool* active) {
  const int64_t sample = blockIdx.x / parts.count;
  if (!is_active(active, sample)) return;
  const int64_t first = (blockIdx.x - sample * parts.count) * parts.length;
  const int64_t length = min(parts.length, size - first);
  const double norm = l1_norm(grad + sample * size + first, length, vectors);
  if (threadIdx.x == 0) norms[blockIdx.x] = norm;
}

template <class C, class G>
__global__ void __launch_bounds__(kMostThreads)
    update_parts(C* momentum, const double* norms, const G* grad, int64_t size, bool vectors,
                 Parts parts, double decay, const bool* active) {
  const int64_t sample = blockIdx.x / parts.count;
  if (!is_active(active, sample)) return;
  double norm[1] = {0};
  if (threadIdx.x < parts.count) norm[0] = norms[sample * parts.count + threadIdx.x];
  combine_block(norm, Add{});
  const int64_t first = (blockIdx.x - sample * parts.count) * parts.length;
  const int64_t at = sample * size + first, length = min(parts.length, size - first);
  update_block(momentum + at, grad + at, length, vectors, C(decay), factor_of<C>(norm[0]));
}

template <class C, class G>
cudaError_t launch(const MomentumUpdate& u, cudaStream_t stream) {
  C* momentum = static_cast<C*>(u.momentum);
  const G* grad = static_cast<const G*>(u.grad);
  const bool vectors = aligned(u.size, kVector<C, G>, u.momentum, u.grad);
  const Parts parts = parts_of(u.size);
  const unsigned blocks = unsigned(u.batch * parts.count);
  const int threads = reduction_threads(parts.length, kVector<C, G>);
  if (parts.count == 1) {
    update_samples<C, G>
        <<<blocks, threads, 0, stream>>>(momentum, grad, u.size, vectors, u.decay, u.active);
    return cudaGetLastError();
  }
  norms_of_parts<G>
      <<<blocks, threads, 0, stream>>>(u.workspace, grad, u.size, vectors, parts, u.active);
  update_parts<C, G><<<blocks, threads, 0, stream>>>(momentum, u.workspace, grad, u.size, vectors,
                                                     parts, u.decay, u.active);
  return cudaGetLastError();
}

}  // namespace

int64_t momentum_update_workspace(const MomentumUpdate& u) {
  const Parts parts = parts_of(u.size);
  return parts.count == 1 ? 0 : u.batch * parts.count;
}

cudaError_t launch_momentum_update(const MomentumUpdate& u, cudaStream_t stream) {
  if (u.batch * u.size == 0) return cudaSuccess;
  return dispatch(u.grad_dtype, [&](auto g) {
    using G = typename decltype(g)::type;
    return u.dtype == Dtype::kDouble ? launch<double, G>(u, stream) : launch<float, G>(u, stream);
  });
}

}  // namespace fastadv::cuda
