// Sums over each sample, by one block per sample or, for large samples, in two stages, and
// elementwise passes with a few numbers per sample, for all ops on batches of features.
#pragma once

#include "cuda/launch.cuh"

namespace fastadv::cuda {

// A Terms says what is summed. It has the members
//   C, kSums       the dtype of computation and how many sums there are,
//   kWidth         elements a thread reads at once,
//   kUnroll        such reads whose loads are in flight together, of each of the features,
//   add<n>(sums, i)  adds the terms of the n elements from i on to C sums[kSums].
// A Results has write(sample, sums), which one thread per sample calls.

// The sums of `length` elements from `start` on, in all threads of the block: each thread's short
// sums in the dtype of computation, added up in double.
template <class Terms>
__device__ void sums_of_block(double (&sums)[Terms::kSums], const Terms& terms, int64_t start,
                              int64_t length, bool vectors) {
  typename Terms::C of_thread[Terms::kSums] = {};
  for_elements<Terms::kWidth, Terms::kUnroll>(length, vectors, [&](int64_t i, auto count) {
    terms.template add<count.value>(of_thread, start + i);
  });
#pragma unroll
  for (int k = 0; k < Terms::kSums; ++k) sums[k] = of_thread[k];
  combine_block(sums, Add{});
}

// One block per sample.
template <class Terms, class Results>
__global__ void __launch_bounds__(kMostThreads)
    sums_of_samples(Terms terms, int64_t size, bool vectors, Results results) {
  const int64_t sample = blockIdx.x;
  double sums[Terms::kSums];
  sums_of_block(sums, terms, sample * size, size, vectors);
  if (threadIdx.x == 0) results.write(sample, sums);
}

// First stage for large samples: the sums of each part, [kSums, B, parts].
template <class Terms>
__global__ void __launch_bounds__(kMostThreads)
    sums_of_parts(Terms terms, int64_t size, bool vectors, Parts parts, double* partial) {
  const int64_t sample = blockIdx.x / parts.count;
  const int64_t first = (blockIdx.x - sample * parts.count) * parts.length;
  double sums[Terms::kSums];
  sums_of_block(sums, terms, sample * size + first, min(parts.length, size - first), vectors);
  if (threadIdx.x == 0) {
    for (int k = 0; k < Terms::kSums; ++k) partial[k * int64_t(gridDim.x) + blockIdx.x] = sums[k];
  }
}

// Second stage for large samples: a warp per sample.
template <int kSums, class Results>
__global__ void finish_parts(const double* partial, int64_t parts, Results results) {
  const int64_t sample = blockIdx.x;
  double sums[kSums] = {};
  for (int64_t part = threadIdx.x; part < parts; part += 32) {
    for (int k = 0; k < kSums; ++k) {
      sums[k] += partial[(k * int64_t(gridDim.x) + sample) * parts + part];
    }
  }
  combine_warp(sums, Add{});
  if (threadIdx.x == 0) results.write(sample, sums);
}

// Elements of the workspace of launch_sums().
inline int64_t sums_workspace(int sums, int64_t batch, int64_t size) {
  const Parts parts = parts_of(size);
  return parts.count == 1 ? 0 : sums * batch * parts.count;
}

template <class Terms, class Results>
cudaError_t launch_sums(const Terms& terms, const Results& results, int64_t batch, int64_t size,
                        bool vectors, double* workspace, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const Parts parts = parts_of(size);
  const int threads = reduction_threads(parts.length, Terms::kWidth);
  if (parts.count == 1) {
    sums_of_samples<<<unsigned(batch), threads, 0, stream>>>(terms, size, vectors, results);
  } else {
    sums_of_parts<<<unsigned(batch * parts.count), threads, 0, stream>>>(terms, size, vectors,
                                                                         parts, workspace);
    finish_parts<Terms::kSums><<<unsigned(batch), 32, 0, stream>>>(workspace, parts.count, results);
  }
  return cudaGetLastError();
}

constexpr int kElementwiseThreads = 256;

// Where a block of an elementwise pass works: a run of one vector per thread in one sample.
struct Run {
  int64_t sample, start, length;

  __device__ Run(int width, int64_t size, unsigned blocks_per_sample) {
    const unsigned of = blockIdx.x / blocks_per_sample;
    const int64_t first =
        int64_t(blockIdx.x - of * blocks_per_sample) * kElementwiseThreads * width;
    sample = of;
    start = sample * size + first;
    length = min(int64_t(kElementwiseThreads) * width, size - first);
  }
};

inline unsigned runs_per_sample(int width, int64_t size) {
  return unsigned(divide_up(size, int64_t(kElementwiseThreads) * width));
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

}  // namespace fastadv::cuda
