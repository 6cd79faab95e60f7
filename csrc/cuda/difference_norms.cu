// Norms of differences from one common batch of features in CUDA C++: the Euclidean distance (one
// difference) and VFD's two. Definitions: fastadv/ops/euclidean_distance.py and
// fastadv/ops/vanilla_feature_distillation.py.
//
// There is a CUDA C++ and a Triton version for the reason given in angular_distance.cu: on the
// features of a training batch Triton's Python launcher takes longer than the kernels do.
#include "cuda/difference_norms.h"
#include "cuda/feature_sums.cuh"

namespace fastadv::cuda {
namespace {

// |u - v|^2
template <class U, class V>
struct OneDifference {
  using C = Compute<U, V>;
  static constexpr int kSums = 1, kWidth = kVector<U, V>, kUnroll = 4;
  const U* u;
  const V* v;

  template <int N>
  __device__ void add(C (&sums)[kSums], int64_t i) const {
    const auto a = load_vector<N>(u + i);
    const auto b = load_vector<N>(v + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const C d = C(load(a.at[k])) - C(load(b.at[k]));
      sums[0] = fma(d, d, sums[0]);
    }
  }
};

// |u - v|^2 and |w - v|^2
template <class U, class V>
struct TwoDifferences {
  using C = Compute<U, V>;
  static constexpr int kSums = 2, kWidth = kVector<U, V>, kUnroll = 2;
  const U* u;
  const U* w;
  const V* v;

  template <int N>
  __device__ void add(C (&sums)[kSums], int64_t i) const {
    const auto a = load_vector<N>(u + i);
    const auto b = load_vector<N>(w + i);
    const auto c = load_vector<N>(v + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const C center = load(c.at[k]);
      const C d = C(load(a.at[k])) - center, e = C(load(b.at[k])) - center;
      sums[0] = fma(d, d, sums[0]);
      sums[1] = fma(e, e, sums[1]);
    }
  }
};

template <class C>
struct OneNorm {
  C* norm;
  bool squared;

  __device__ void write(int64_t sample, const double (&sums)[1]) const {
    norm[sample] = C(squared ? sums[0] : sqrt(sums[0]));
  }
};

template <class C>
struct TwoNorms {
  C* total;
  C* norms;

  __device__ void write(int64_t sample, const double (&sums)[2]) const {
    const double of_u = sqrt(sums[0]), of_w = sqrt(sums[1]);
    total[sample] = C(of_u + of_w);
    norms[2 * sample] = C(of_u);
    norms[2 * sample + 1] = C(of_w);
  }
};

// The gradient is this times the difference; 0 where the norm is 0.
template <class C>
__device__ C slope_of(C grad, C norm, bool squared) {
  if (squared) return 2 * grad;
  return norm == 0 ? C(0) : grad / norm;
}

template <class U, class V>
struct Gradients {
  U* out_u;
  U* out_w;
  V* out_v;
  const U* u;
  const U* w;
  const V* v;
};

template <class U, class V>
__global__ void __launch_bounds__(kElementwiseThreads)
    difference_gradients(Gradients<U, V> g, int64_t size, bool vectors, unsigned blocks_per_sample,
                         bool squared, PerSample grad, const Compute<U, V>* norms,
                         int64_t norms_stride) {
  using C = Compute<U, V>;
  constexpr int kWidth = kVector<U, V>;
  const Run run(kWidth, size, blocks_per_sample);
  const C slope = C(number_of(grad, run.sample));
  const C* norm = norms + run.sample * norms_stride;
  const C of_u = slope_of(slope, norm[0], squared);
  const C of_w = g.w ? slope_of(slope, norm[1], squared) : C(0);
  for_elements<kWidth>(run.length, vectors, [&](int64_t i, auto count) {
    constexpr int kCount = count.value;
    const int64_t at = run.start + i;
    const auto center = load_vector<kCount>(g.v + at);
    const auto a = load_vector<kCount>(g.u + at);
    Vector<U, kCount> to_u;
    Vector<V, kCount> to_v;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const C gradient = of_u * (C(load(a.at[k])) - C(load(center.at[k])));
      to_u.at[k] = rounded<U>(gradient);
      to_v.at[k] = rounded<V>(-gradient);
    }
    if (g.out_u) store_vector(g.out_u + at, to_u);
    if (g.out_v) store_vector(g.out_v + at, to_v);
    if (!g.out_w) return;
    const auto b = load_vector<kCount>(g.w + at);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      to_u.at[k] = rounded<U>(of_w * (C(load(b.at[k])) - C(load(center.at[k]))));
    }
    store_vector(g.out_w + at, to_u);
  });
}

}  // namespace

int64_t difference_norms_workspace(const DifferenceNorms& a) {
  return sums_workspace(a.norms ? 2 : 1, a.batch, a.size);
}

cudaError_t launch_difference_norms(const DifferenceNorms& a, cudaStream_t stream) {
  return dispatch_pair(a.u_dtype, a.v_dtype, a.u, a.v, [&](auto* u, auto* v) {
    using U = std::remove_const_t<std::remove_pointer_t<decltype(u)>>;
    using V = std::remove_const_t<std::remove_pointer_t<decltype(v)>>;
    using C = Compute<U, V>;
    const U* w = static_cast<const U*>(a.w);
    C* result = static_cast<C*>(a.result);
    const bool vectors = aligned(a.size, kVector<U, V>, u, w, v);
    if (!a.norms) {
      return launch_sums(OneDifference<U, V>{u, v}, OneNorm<C>{result, a.squared}, a.batch, a.size,
                         vectors, a.workspace, stream);
    }
    if constexpr (std::is_same_v<U, double> != std::is_same_v<V, double>) {
      return cudaErrorInvalidValue;
    } else {
      return launch_sums(TwoDifferences<U, V>{u, w, v},
                         TwoNorms<C>{result, static_cast<C*>(a.norms)}, a.batch, a.size, vectors,
                         a.workspace, stream);
    }
  });
}

cudaError_t launch_difference_norms_backward(const DifferenceNormsBackward& a,
                                             cudaStream_t stream) {
  if (a.batch * a.size == 0) return cudaSuccess;
  return dispatch_pair(a.u_dtype, a.v_dtype, a.u, a.v, [&](auto* u, auto* v) {
    using U = std::remove_const_t<std::remove_pointer_t<decltype(u)>>;
    using V = std::remove_const_t<std::remove_pointer_t<decltype(v)>>;
    constexpr int kWidth = kVector<U, V>;
    const Gradients<U, V> g{static_cast<U*>(a.out_u),   static_cast<U*>(a.out_w),
                            static_cast<V*>(a.out_v),   u,
                            static_cast<const U*>(a.w), v};
    const bool vectors = aligned(a.size, kWidth, g.out_u, g.out_w, g.out_v, g.u, g.w, g.v);
    const unsigned runs = runs_per_sample(kWidth, a.size);
    difference_gradients<<<unsigned(a.batch) * runs, kElementwiseThreads, 0, stream>>>(
        g, a.size, vectors, runs, a.squared, a.grad, static_cast<const Compute<U, V>*>(a.norms),
        a.norms_stride);
    return cudaGetLastError();
  });
}

}  // namespace fastadv::cuda
