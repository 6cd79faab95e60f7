// One step of projected gradient ascent in CUDA C++: linf. Formula: fastadv/ops/pgd_step.py.
//
// This op has a CUDA C++ and a Triton version. Both are bound by memory; this one also launches in
// a few microseconds where Triton's Python launcher takes tens, which is what small batches wait
// for when an attack loop is not captured in a graph.
#include "cuda/pgd_step.cuh"

namespace fastadv::cuda {
namespace {

constexpr int kLinfThreads = 256;

template <class C>
struct Limits {
  C eps, alpha, low, high;
};

template <class C, class V>
__device__ C linf_moved(C adv, V grad, C x, const Limits<C>& limits) {
  const C step = grad > 0 ? limits.alpha : grad < 0 ? -limits.alpha : C(0);
  const C moved = clip(adv + step, x - limits.eps, x + limits.eps);
  return clip(moved, limits.low, limits.high);
}

// The batch as one run of n elements; a thread takes one vector.
template <class T, class G>
__global__ void __launch_bounds__(kLinfThreads)
    step_linf(Operands<T, G> all, int64_t n, int64_t size, Limits<Compute<T>> limits, PerSample eps,
              PerSample alpha, const bool* active, int64_t* counts) {
  using C = Compute<T>;
  constexpr int kWidth = kVector<T, G>;
  const int64_t start = int64_t(blockIdx.x) * kLinfThreads * kWidth;
  const Operands<T, G> here = all.from(start);
  const bool varies = eps.values || alpha.values || active;
  Seen seen;
  const int64_t length = min(int64_t(kLinfThreads) * kWidth, n - start);
  for_elements<kWidth>(length, here.vectors, [&](int64_t i, auto count) {
    constexpr int kCount = count.value;
    const auto adv = load_vector<kCount>(here.adv + i);
    if (varies) {
      const int64_t sample = (start + i) / size;
      if (!is_active(active, sample)) {
        if (here.out != here.adv) store_vector(here.out + i, adv);
        return;
      }
      limits.eps = C(number_of(eps, sample));
      limits.alpha = C(number_of(alpha, sample));
    }
    const auto grad = load_vector<kCount>(here.grad + i);
    const auto x = load_vector<kCount>(here.x + i);
    Vector<T, kCount> out;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const auto g = load(grad.at[k]);
      if (counts) seen.add(g);
      out.at[k] = rounded<T>(linf_moved(load(adv.at[k]), g, load(x.at[k]), limits));
    }
    store_vector(here.out + i, out);
  });
  if (counts) seen.add_to(counts);
}

}  // namespace

cudaError_t launch_pgd_step_linf(const PgdStep& s, cudaStream_t stream) {
  const int64_t n = s.batch * s.size;
  if (n == 0) return cudaSuccess;
  return dispatch_step(s, [&](auto t, auto g) {
    using T = typename decltype(t)::type;
    using G = typename decltype(g)::type;
    using C = Compute<T>;
    const bool varies = s.eps.values || s.alpha.values || s.active;
    // Where no sample differs from the others, their borders do not matter to vectors.
    const auto all = operands<T, G>(s, varies ? s.size : 0);
    const Limits<C> limits{C(s.eps.number), C(s.alpha.number), C(s.low), C(s.high)};
    const int64_t blocks = divide_up(n, int64_t(kLinfThreads) * kVector<T, G>);
    step_linf<T, G><<<unsigned(blocks), kLinfThreads, 0, stream>>>(all, n, s.size, limits, s.eps,
                                                                   s.alpha, s.active, s.counts);
    return cudaGetLastError();
  });
}

}  // namespace fastadv::cuda
