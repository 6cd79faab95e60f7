// Angular distance and the replay switch in CUDA C++. Definition: fastadv/ops/angular_distance.py.
//
// This op has a CUDA C++ and a Triton version. Both are bound by memory, but the features of a
// training batch are a few megabytes, a kernel of two or three microseconds: Triton's Python
// launcher alone takes several times as long, twice per step.
#include <cmath>

#include "cuda/angular_distance.h"
#include "cuda/feature_sums.cuh"

namespace fastadv::cuda {
namespace {

// u.v, u.u and v.v
template <class U, class V>
struct Moments {
  using C = Compute<U, V>;
  static constexpr int kSums = 3, kWidth = kVector<U, V>, kUnroll = 4;
  const U* u;
  const V* v;

  template <int N>
  __device__ void add(C (&sums)[kSums], int64_t i) const {
    const auto a = load_vector<N>(u + i);
    const auto b = load_vector<N>(v + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const C x = load(a.at[k]), y = load(b.at[k]);
      sums[0] = fma(x, y, sums[0]);
      sums[1] = fma(x, x, sums[1]);
      sums[2] = fma(y, y, sums[2]);
    }
  }
};

// The product of the two norms; NaN where squares have overflowed, as nothing can be said then.
template <class C>
__device__ C length_of(C uu, C vv) {
  const C length = sqrt(uu) * sqrt(vv);
  return isinf(length) ? C(NAN) : length;
}

template <class C>
struct Results {
  C* distance;
  C* moments;
  bool* far;
  C tau;

  __device__ void write(int64_t sample, const double (&moments_of_sample)[3]) const {
    const double length = length_of(moments_of_sample[1], moments_of_sample[2]);
    C d = length == 0 ? C(1) : C(1 - fabs(moments_of_sample[0]) / length);
    d = d < 0 ? C(0) : d;  // rounding; a NaN stays
    distance[sample] = d;
    if (far) far[sample] = d > tau;
    if (moments) {
      for (int k = 0; k < 3; ++k) moments[3 * sample + k] = C(moments_of_sample[k]);
    }
  }
};

// The gradient in u is along_u * u + across * v, that in v along_v * v + across * u.
template <class C>
struct Slopes {
  C along_u, along_v, across;

  __device__ Slopes(C grad, const C* moments) {
    const C dot = moments[0], uu = moments[1], vv = moments[2], length = length_of(uu, vv);
    const C signed_grad = dot > 0 ? -grad : dot < 0 ? grad : C(0);
    across = length == 0 ? C(0) : signed_grad / length;
    along_u = length == 0 ? C(0) : -across * dot / uu;
    along_v = length == 0 ? C(0) : -across * dot / vv;
  }
};

template <class U, class V>
__global__ void __launch_bounds__(kElementwiseThreads)
    backward(U* out_u, V* out_v, const U* u, const V* v, int64_t size, bool vectors,
             unsigned blocks_per_sample, PerSample grad, const Compute<U, V>* moments) {
  using C = Compute<U, V>;
  constexpr int kWidth = kVector<U, V>;
  const Run run(kWidth, size, blocks_per_sample);
  const Slopes<C> slopes(C(number_of(grad, run.sample)), moments + 3 * run.sample);
  for_elements<kWidth>(run.length, vectors, [&](int64_t i, auto count) {
    const auto a = load_vector<count.value>(u + run.start + i);
    const auto b = load_vector<count.value>(v + run.start + i);
    Vector<U, count.value> to_u;
    Vector<V, count.value> to_v;
#pragma unroll
    for (int k = 0; k < count.value; ++k) {
      const C x = load(a.at[k]), y = load(b.at[k]);
      to_u.at[k] = rounded<U>(slopes.along_u * x + slopes.across * y);
      to_v.at[k] = rounded<V>(slopes.along_v * y + slopes.across * x);
    }
    if (out_u) store_vector(out_u + run.start + i, to_u);
    if (out_v) store_vector(out_v + run.start + i, to_v);
  });
}

}  // namespace

int64_t angular_distance_workspace(const AngularDistance& a) {
  return sums_workspace(3, a.batch, a.size);
}

cudaError_t launch_angular_distance(const AngularDistance& a, cudaStream_t stream) {
  return dispatch_pair(a.u_dtype, a.v_dtype, a.u, a.v, [&](auto* u, auto* v) {
    using U = std::remove_const_t<std::remove_pointer_t<decltype(u)>>;
    using V = std::remove_const_t<std::remove_pointer_t<decltype(v)>>;
    using Terms = Moments<U, V>;
    using C = typename Terms::C;
    const Results<C> results{static_cast<C*>(a.distance), static_cast<C*>(a.moments), a.far,
                             C(a.tau)};
    const bool vectors = aligned(a.size, Terms::kWidth, u, v);
    return launch_sums(Terms{u, v}, results, a.batch, a.size, vectors, a.workspace, stream);
  });
}

cudaError_t launch_angular_distance_backward(const AngularDistanceBackward& a,
                                             cudaStream_t stream) {
  if (a.batch * a.size == 0) return cudaSuccess;
  return dispatch_pair(a.u_dtype, a.v_dtype, a.u, a.v, [&](auto* u, auto* v) {
    using U = std::remove_const_t<std::remove_pointer_t<decltype(u)>>;
    using V = std::remove_const_t<std::remove_pointer_t<decltype(v)>>;
    constexpr int kWidth = kVector<U, V>;
    const bool vectors = aligned(a.size, kWidth, u, v, a.out_u, a.out_v);
    const unsigned runs = runs_per_sample(kWidth, a.size);
    backward<<<unsigned(a.batch) * runs, kElementwiseThreads, 0, stream>>>(
        static_cast<U*>(a.out_u), static_cast<V*>(a.out_v), u, v, a.size, vectors, runs, a.grad,
        static_cast<const Compute<U, V>*>(a.moments));
    return cudaGetLastError();
  });
}

}  // namespace fastadv::cuda
