// The PGD step in l2 in CUDA C++. Formula and budget: fastadv/ops/pgd_step.py.
//
// The step and the projection follow from three sums per sample, g.g, g.d and d.d with
// d = adv - x, because |d + f g|^2 = d.d + 2 f g.d + f^2 g.g. They are added up in double, in which
// neither squares of tiny float gradients vanish nor the sum cancels, so that one pass over the
// operands is enough before the one that writes. Only a double gradient is scaled by its largest
// magnitude first.
#include "cuda/pgd_step.cuh"

namespace fastadv::cuda {
namespace {

template <class G>
constexpr bool kScaled = std::is_same_v<G, double>;

// The gradient element as a double, over its scale where it has one.
template <class G>
__device__ double scaled(G grad, double scale) {
  const double g = load(grad);
  if constexpr (kScaled<G>) return scale > 0 ? g / scale : g;
  return g;
}

// The largest magnitude among `length` elements, in all threads of the block.
template <class G>
__device__ double largest_magnitude(const G* grad, int64_t length, bool vectors) {
  double largest[1] = {0};
  for_elements<kVector<G>, 4>(length, vectors, [&](int64_t i, auto count) {
    const auto g = load_vector<count.value>(grad + i);
#pragma unroll
    for (int k = 0; k < count.value; ++k) {
      largest[0] = Larger{}(largest[0], fabs(double(load(g.at[k]))));
    }
  });
  combine_block(largest, Larger{});
  return largest[0];
}

// g.g, g.d and d.d of `length` elements, in all threads of the block.
template <class T, class G>
__device__ void sum_block(double (&sums)[3], const Operands<T, G>& here, int64_t length,
                          double scale, int64_t* counts) {
  Seen seen;
  sums[0] = sums[1] = sums[2] = 0;
  for_elements<kVector<T, G>, 2>(length, here.vectors, [&](int64_t i, auto count) {
    constexpr int kCount = count.value;
    const auto adv = load_vector<kCount>(here.adv + i);
    const auto grad = load_vector<kCount>(here.grad + i);
    const auto x = load_vector<kCount>(here.x + i);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (counts) seen.add(load(grad.at[k]));
      const double g = scaled(grad.at[k], scale);
      const double d = double(load(adv.at[k])) - double(load(x.at[k]));
      sums[0] = fma(g, g, sums[0]);
      sums[1] = fma(g, d, sums[1]);
      sums[2] = fma(d, d, sums[2]);
    }
  });
  if (counts) seen.add_to(counts);
  combine_block(sums, Add{});
}

// The factor of the (scaled) gradient, and the one that brings the moved point into the ball.
struct Projection {
  double factor, shrink;
};

template <class C>
__device__ Projection projection_of(const double (&sums)[3], double eps, double alpha) {
  const bool usable = sums[0] > 0 && isfinite(sums[0]);
  double f = usable ? alpha / sqrt(sums[0]) : 0;
  if constexpr (std::is_same_v<C, float>) f = rounded_to_float_precision(f);
  const double squared = usable ? sums[2] + 2 * f * sums[1] + f * f * sums[0] : sums[2];
  const double length = sqrt(squared < 0 ? 0 : squared);
  return {f, length > eps ? eps / length : 1};
}

// The second pass over `length` elements.
template <class T, class G>
__device__ void write_block(const Operands<T, G>& here, int64_t length, double scale,
                            const Projection& p, Compute<T> low, Compute<T> high) {
  using C = Compute<T>;
  const C shrink = C(p.shrink);
  for_elements<kVector<T, G>>(length, here.vectors, [&](int64_t i, auto count) {
    constexpr int kCount = count.value;
    const auto adv = load_vector<kCount>(here.adv + i);
    const auto grad = load_vector<kCount>(here.grad + i);
    const auto x = load_vector<kCount>(here.x + i);
    Vector<T, kCount> out;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const C step = p.factor == 0 ? C(0) : C(scaled(grad.at[k], scale) * p.factor);
      const C centre = load(x.at[k]), delta = load(adv.at[k]) + step - centre;
      out.at[k] = rounded<T>(clip(centre + delta * shrink, low, high));
    }
    store_vector(here.out + i, out);
  });
}

struct L2 {
  int64_t size;
  Parts parts;
  PerSample eps, alpha;
  double low, high;
  const bool* active;
  int64_t* counts;
  double* partial;  // [3, B, parts]
  double* largest;  // [B, parts], for scaled gradients

  // eps and alpha are rounded to the dtype of computation, as every backend does.
  template <class C>
  __device__ Projection project(const double (&sums)[3], int64_t sample) const {
    return projection_of<C>(sums, C(number_of(eps, sample)), C(number_of(alpha, sample)));
  }
};

// One block per sample; its second pass reads what the first left in the caches.
template <class T, class G>
__global__ void __launch_bounds__(kMostThreads) step_l2(Operands<T, G> all, L2 l2) {
  using C = Compute<T>;
  const int64_t sample = blockIdx.x;
  const Operands<T, G> here = all.from(sample * l2.size);
  if (!is_active(l2.active, sample)) return copy_block(here, l2.size);
  double scale = 1, sums[3];
  if constexpr (kScaled<G>) scale = largest_magnitude(here.grad, l2.size, here.vectors);
  sum_block(sums, here, l2.size, scale, l2.counts);
  const Projection p = l2.project<C>(sums, sample);
  write_block(here, l2.size, scale, p, C(l2.low), C(l2.high));
}

// A block's share of a large sample.
struct Part {
  int64_t sample, start, length;

  __device__ explicit Part(const L2& l2) {
    sample = blockIdx.x / l2.parts.count;
    const int64_t first = (blockIdx.x - sample * l2.parts.count) * l2.parts.length;
    start = sample * l2.size + first;
    length = min(l2.parts.length, l2.size - first);
  }
};

template <class G>
__global__ void __launch_bounds__(kMostThreads) largest_parts(const G* grad, bool vectors, L2 l2) {
  const Part part(l2);
  if (!is_active(l2.active, part.sample)) return;
  const double largest = largest_magnitude(grad + part.start, part.length, vectors);
  if (threadIdx.x == 0) l2.largest[blockIdx.x] = largest;
}

template <class G>
__device__ double scale_of_sample(const L2& l2, int64_t sample) {
  double largest[1] = {0};
  if constexpr (kScaled<G>) {
    if (threadIdx.x < l2.parts.count) {
      largest[0] = l2.largest[sample * l2.parts.count + threadIdx.x];
    }
    combine_block(largest, Larger{});
  }
  return largest[0];
}

template <class T, class G>
__global__ void __launch_bounds__(kMostThreads) sum_parts(Operands<T, G> all, L2 l2) {
  const Part part(l2);
  if (!is_active(l2.active, part.sample)) return;
  const double scale = scale_of_sample<G>(l2, part.sample);
  double sums[3];
  sum_block(sums, all.from(part.start), part.length, scale, l2.counts);
  if (threadIdx.x == 0) {
    for (int k = 0; k < 3; ++k) l2.partial[k * int64_t(gridDim.x) + blockIdx.x] = sums[k];
  }
}

template <class T, class G>
__global__ void __launch_bounds__(kMostThreads) write_parts(Operands<T, G> all, L2 l2) {
  using C = Compute<T>;
  const Part part(l2);
  if (!is_active(l2.active, part.sample)) return copy_block(all.from(part.start), part.length);
  const double scale = scale_of_sample<G>(l2, part.sample);
  double sums[3] = {0, 0, 0};
  if (threadIdx.x < l2.parts.count) {
    const int64_t at = part.sample * l2.parts.count + threadIdx.x;
    for (int k = 0; k < 3; ++k) sums[k] = l2.partial[k * int64_t(gridDim.x) + at];
  }
  combine_block(sums, Add{});
  const Projection p = l2.project<C>(sums, part.sample);
  write_block(all.from(part.start), part.length, scale, p, C(l2.low), C(l2.high));
}

}  // namespace

int64_t pgd_step_l2_workspace(const PgdStep& step) {
  const Parts parts = parts_of(step.size);
  return parts.count == 1 ? 0 : 4 * step.batch * parts.count;
}

cudaError_t launch_pgd_step_l2(const PgdStep& s, cudaStream_t stream) {
  if (s.batch * s.size == 0) return cudaSuccess;
  const Parts parts = parts_of(s.size);
  const int64_t blocks = s.batch * parts.count;
  double* largest = s.workspace ? s.workspace + 3 * blocks : nullptr;
  const L2 l2{s.size, parts,    s.eps,    s.alpha,     s.low,
              s.high, s.active, s.counts, s.workspace, largest};
  return dispatch_step(s, [&](auto t, auto g) {
    using T = typename decltype(t)::type;
    using G = typename decltype(g)::type;
    const auto all = operands<T, G>(s, s.size);
    const int threads = reduction_threads(parts.length, kVector<T, G>);
    const unsigned grid = unsigned(blocks);
    if (parts.count == 1) {
      step_l2<T, G><<<grid, threads, 0, stream>>>(all, l2);
      return cudaGetLastError();
    }
    if constexpr (kScaled<G>) {
      largest_parts<G><<<grid, threads, 0, stream>>>(all.grad, all.vectors, l2);
    }
    sum_parts<T, G><<<grid, threads, 0, stream>>>(all, l2);
    write_parts<T, G><<<grid, threads, 0, stream>>>(all, l2);
    return cudaGetLastError();
  });
}

}  // namespace fastadv::cuda
