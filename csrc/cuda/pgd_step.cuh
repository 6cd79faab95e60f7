// Operands, dispatch and counters of the PGD step, the same for all norms. Formula and budget:
// fastadv/ops/pgd_step.py.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/pgd_step.h"

namespace fastadv::cuda {

template <class T, class G>
struct Operands {
  T* out;
  const T* adv;
  const G* grad;
  const T* x;
  bool vectors;

  __device__ Operands from(int64_t start) const {
    return {out + start, adv + start, grad + start, x + start, vectors};
  }
};

template <class T, class G>
Operands<T, G> operands(const PgdStep& s, int64_t row) {
  const bool vectors = aligned(row, kVector<T, G>, s.out, s.adv, s.grad, s.x);
  return {static_cast<T*>(s.out), static_cast<const T*>(s.adv), static_cast<const G*>(s.grad),
          static_cast<const T*>(s.x), vectors};
}

// Calls f(Type<T>{}, Type<G>{}) with the types of the images and of the gradient.
template <class F>
cudaError_t dispatch_step(const PgdStep& s, F&& f) {
  return dispatch(s.dtype,
                  [&](auto t) { return dispatch(s.grad_dtype, [&](auto g) { return f(t, g); }); });
}

// Gradient elements a thread has seen that are zero, and that are not finite.
struct Seen {
  unsigned long long number[2] = {0, 0};

  template <class V>
  __device__ void add(V g) {
    number[0] += g == 0;
    number[1] += g - g != 0;  // NaN for infinities and NaN
  }
  // Integers: the order of the additions does not matter. All threads of the warp must call it.
  __device__ void add_to(int64_t* counts) {
    combine_warp(number, Add{});
    if (threadIdx.x % 32) return;
    for (int k = 0; k < 2; ++k) {
      if (number[k]) atomicAdd(reinterpret_cast<unsigned long long*>(counts) + k, number[k]);
    }
  }
};

// What is done to a sample that is not active: nothing, where the step works in place.
template <class T, class G>
__device__ void copy_block(const Operands<T, G>& here, int64_t length) {
  if (here.out == here.adv) return;
  for_elements<kVector<T, G>>(length, here.vectors, [&](int64_t i, auto count) {
    store_vector(here.out + i, load_vector<count.value>(here.adv + i));
  });
}

}  // namespace fastadv::cuda
