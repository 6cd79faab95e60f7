// Angular distance and the replay switch in CUDA C++. Definition: fastadv/ops/angular_distance.py.
//
// This op has a CUDA C++ and a Triton version. Both are bound by memory, but the features of a
// training batch are a few megabytes, a kernel of two or three microseconds: Triton's Python
// launcher alone takes several times as long, twice per step.
#include "cuda/angular_distance.h"
#include "cuda/launch.cuh"

namespace fastadv::cuda {
namespace {

constexpr int kBackwardThreads = 256;

// u.v, u.u and v.v of `length` elements, in all threads of the block: each thread's short sums in
// the dtype of computation, added up in double.
template <class U, class V>
__device__ void moments_of_block(double (&moments)[3], const U* u, const V* v, int64_t length,
                                 bool vectors) {
  using C = Compute<U, V>;
  C dot = 0, uu = 0, vv = 0;
  for_elements<kVector<U, V>, 4>(length, vectors, [&](int64_t i, auto count) {
    const auto a = load_vector<count.value>(u + i);
    const auto b = load_vector<count.value>(v + i);
#pragma unroll
    for (int k = 0; k < count.value; ++k) {
      const C x = load(a.at[k]), y = load(b.at[k]);
      dot = fma(x, y, dot);
      uu = fma(x, x, uu);
      vv = fma(y, y, vv);
    }
  });
  moments[0] = dot;
  moments[1] = uu;
  moments[2] = vv;
  combine_block(moments, Add{});
}

template <class C>
struct Results {
  C* distance;
  C* moments;
  bool* far;
  C tau;

  __device__ void write(int64_t sample, const double (&moments_of_sample)[3]) const {
    const double length = sqrt(moments_of_sample[1]) * sqrt(moments_of_sample[2]);
    C d = length == 0 ? C(1) : C(1 - fabs(moments_of_sample[0]) / length);
    d = d < 0 ? C(0) : d;  // rounding; a NaN stays
    distance[sample] = d;
    if (far) far[sample] = d > tau;
    if (moments) {
      for (int k = 0; k < 3; ++k) moments[3 * sample + k] = C(moments_of_sample[k]);
    }
  }
};

// One block per sample.
template <class U, class V>
__global__ void __launch_bounds__(kMostThreads)
    distances(const U* u, const V* v, int64_t size, bool vectors, Results<Compute<U, V>> results) {
  const int64_t sample = blockIdx.x, start = sample * size;
  double moments[3];
  moments_of_block(moments, u + start, v + start, size, vectors);
  if (threadIdx.x == 0) results.write(sample, moments);
}

// First stage for large samples: the moments of each part, [3, B, parts].
template <class U, class V>
__global__ void __launch_bounds__(kMostThreads)
    moments_of_parts(const U* u, const V* v, int64_t size, bool vectors, Parts parts,
                     double* partial) {
  const int64_t sample = blockIdx.x / parts.count;
  const int64_t first = (blockIdx.x - sample * parts.count) * parts.length;
  const int64_t start = sample * size + first;
  double moments[3];
  moments_of_block(moments, u + start, v + start, min(parts.length, size - first), vectors);
  if (threadIdx.x == 0) {
    for (int k = 0; k < 3; ++k) partial[k * int64_t(gridDim.x) + blockIdx.x] = moments[k];
  }
}

// Second stage for large samples: a warp per sample.
template <class C>
__global__ void distances_of_parts(const double* partial, int64_t parts, Results<C> results) {
  const int64_t sample = blockIdx.x;
  double moments[3] = {0, 0, 0};
  for (int64_t part = threadIdx.x; part < parts; part += 32) {
    for (int k = 0; k < 3; ++k) {
      moments[k] += partial[(k * int64_t(gridDim.x) + sample) * parts + part];
    }
  }
  combine_warp(moments, Add{});
  if (threadIdx.x == 0) results.write(sample, moments);
}

// The gradient in u is along_u * u + along_v * v.
template <class C>
struct Slopes {
  C along_u, along_v;

  __device__ Slopes(C grad, const C* moments) {
    const C dot = moments[0], uu = moments[1], length = sqrt(uu) * sqrt(moments[2]);
    const C signed_grad = dot > 0 ? -grad : dot < 0 ? grad : C(0);
    along_v = length == 0 ? C(0) : signed_grad / length;
    along_u = length == 0 ? C(0) : -along_v * dot / uu;
  }
};

template <class U, class V>
__global__ void __launch_bounds__(kBackwardThreads)
    backward(U* out, const U* u, const V* v, int64_t size, bool vectors, unsigned blocks_per_sample,
             PerSample grad, const Compute<U, V>* moments) {
  using C = Compute<U, V>;
  constexpr int kWidth = kVector<U, V>;
  const unsigned sample = blockIdx.x / blocks_per_sample;
  const int64_t first =
      int64_t(blockIdx.x - sample * blocks_per_sample) * kBackwardThreads * kWidth;
  const int64_t start = int64_t(sample) * size + first;
  const Slopes<C> slopes(C(number_of(grad, sample)), moments + 3 * int64_t(sample));
  const int64_t length = min(int64_t(kBackwardThreads) * kWidth, size - first);
  for_elements<kWidth>(length, vectors, [&](int64_t i, auto count) {
    const auto a = load_vector<count.value>(u + start + i);
    const auto b = load_vector<count.value>(v + start + i);
    Vector<U, count.value> to;
#pragma unroll
    for (int k = 0; k < count.value; ++k) {
      const C x = load(a.at[k]), y = load(b.at[k]);
      to.at[k] = rounded<U>(slopes.along_u * x + slopes.along_v * y);
    }
    store_vector(out + start + i, to);
  });
}

// Calls f(u, v) with the addresses in their storage types.
template <class F>
cudaError_t dispatch_pair(Dtype u_dtype, Dtype v_dtype, const void* u, const void* v, F&& f) {
  return dispatch(u_dtype, [&](auto tu) {
    return dispatch(v_dtype, [&](auto tv) {
      using U = typename decltype(tu)::type;
      using V = typename decltype(tv)::type;
      return f(static_cast<const U*>(u), static_cast<const V*>(v));
    });
  });
}

template <class C>
Results<C> results_of(const AngularDistance& a) {
  return {static_cast<C*>(a.distance), static_cast<C*>(a.moments), a.far, C(a.tau)};
}

}  // namespace

int64_t angular_distance_workspace(const AngularDistance& a) {
  const Parts parts = parts_of(a.size);
  return parts.count == 1 ? 0 : 3 * a.batch * parts.count;
}

cudaError_t launch_angular_distance(const AngularDistance& a, cudaStream_t stream) {
  if (a.batch == 0) return cudaSuccess;
  const Parts parts = parts_of(a.size);
  return dispatch_pair(a.u_dtype, a.v_dtype, a.u, a.v, [&](auto* u, auto* v) {
    using U = std::remove_const_t<std::remove_pointer_t<decltype(u)>>;
    using V = std::remove_const_t<std::remove_pointer_t<decltype(v)>>;
    using C = Compute<U, V>;
    constexpr int kWidth = kVector<U, V>;
    const bool vectors = aligned(a.size, kWidth, u, v);
    const int threads = reduction_threads(parts.length, kWidth);
    const Results<C> results = results_of<C>(a);
    if (parts.count == 1) {
      distances<<<unsigned(a.batch), threads, 0, stream>>>(u, v, a.size, vectors, results);
    } else {
      moments_of_parts<<<unsigned(a.batch * parts.count), threads, 0, stream>>>(
          u, v, a.size, vectors, parts, a.workspace);
      distances_of_parts<<<unsigned(a.batch), 32, 0, stream>>>(a.workspace, parts.count, results);
    }
    return cudaGetLastError();
  });
}

cudaError_t launch_angular_distance_backward(const AngularDistanceBackward& a,
                                             cudaStream_t stream) {
  if (a.batch * a.size == 0) return cudaSuccess;
  return dispatch_pair(a.u_dtype, a.v_dtype, a.u, a.v, [&](auto* u, auto* v) {
    using U = std::remove_const_t<std::remove_pointer_t<decltype(u)>>;
    using V = std::remove_const_t<std::remove_pointer_t<decltype(v)>>;
    constexpr int kWidth = kVector<U, V>;
    const bool vectors = aligned(a.size, kWidth, u, v, a.out);
    const int64_t per_sample = divide_up(a.size, int64_t(kBackwardThreads) * kWidth);
    backward<<<unsigned(a.batch * per_sample), kBackwardThreads, 0, stream>>>(
        static_cast<U*>(a.out), u, v, a.size, vectors, unsigned(per_sample), a.grad,
        static_cast<const Compute<U, V>*>(a.moments));
    return cudaGetLastError();
  });
}

}  // namespace fastadv::cuda
