// The PGD step in l1 in CUDA C++. Formula and budget: fastadv/ops/pgd_step.py.
//
// One block does a sample in many passes: a radix selection of the k-th largest gradient magnitude
// (three passes, six for double), the threshold of the projection in mostly fewer than ten sums,
// and the pass that writes. An image of 3x32x32 stays in the multiprocessor's cache all the while
// and one of 3x224x224 in the GPU's, so that the passes cost far less than their number suggests.
#include <cmath>

#include "cuda/pgd_step.cuh"

namespace fastadv::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kDigit = 11;  // bits that one pass of the selection decides
constexpr int kBins = 1 << kDigit;
constexpr int kBinsPerThread = kBins / kThreads;
static_assert(kThreads <= kMostThreads && kBins % kThreads == 0);

// Magnitudes as integers, which are in the same order.
__device__ inline uint64_t magnitude_bits(float g) { return __float_as_uint(g) & 0x7fffffffu; }
__device__ inline uint64_t magnitude_bits(double g) {
  return uint64_t(__double_as_longlong(g)) & 0x7fffffffffffffff;
}
template <class G>
constexpr int kBits = std::is_same_v<G, double> ? 63 : 31;
template <class G>
constexpr uint64_t kInfinity = std::is_same_v<G, double> ? 0x7ff0000000000000 : 0x7f800000;

// The elements that move: those of at least `threshold`, `count` of them.
struct Chosen {
  uint64_t threshold;
  int64_t count;
};

// The digit whose bin holds the `rank`-th largest of the counted elements.
struct Digit {
  unsigned value, rank, count;  // rank within the bin, elements in the bin
};

// All threads of the block must call it; `bins` must be complete.
__device__ Digit find_digit(const unsigned* bins, unsigned rank) {
  __shared__ unsigned of_warp[kThreads / 32];
  __shared__ Digit found;
  // Thread t takes the t-th group of bins from the top.
  const unsigned* mine = bins + kBins - (threadIdx.x + 1) * kBinsPerThread;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned own = 0;
  for (int b = 0; b < kBinsPerThread; ++b) own += mine[b];
  unsigned through = own;  // of this thread and those before it
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned before = __shfl_up_sync(kAllLanes, through, distance);
    if (lane >= distance) through += before;
  }
  if (lane == 31) of_warp[warp] = through;
  __syncthreads();
  for (int w = 0; w < warp; ++w) through += of_warp[w];
  if (rank > through - own && rank <= through) {
    unsigned left = rank - (through - own);
    int b = kBinsPerThread - 1;
    while (left > mine[b]) left -= mine[b--];
    found = {unsigned(mine - bins) + b, left, mine[b]};
  }
  __syncthreads();
  return found;
}

// Calls f with every element's magnitude bits.
template <class G, class F>
__device__ void for_magnitudes(const G* grad, int64_t length, bool vectors, F f) {
  for_elements<kVector<G>>(length, vectors, [&](int64_t i, auto count) {
    const auto g = load_vector<count.value>(grad + i);
#pragma unroll
    for (int k = 0; k < count.value; ++k) f(load(g.at[k]));
  });
}

// As large as the k-th largest and not zero; none where an element is not finite.
template <class G>
__device__ Chosen choose(const G* grad, int64_t length, bool vectors, unsigned k, int64_t* counts) {
  __shared__ unsigned bins[kBins];
  const Chosen none{~uint64_t(0), 0};
  uint64_t prefix = 0;
  unsigned rank = k;
  Digit digit{};
  for (int shift = kBits<G>; shift > 0;) {
    const int width = min(kDigit, shift), above = shift;
    shift -= width;
    for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
    __syncthreads();
    const bool first = above == kBits<G>;
    unsigned long long seen[2] = {0, 0};  // elements that are not zero, and not finite
    Seen special;
    for_magnitudes(grad, length, vectors, [&](auto g) {
      const uint64_t bits = magnitude_bits(g);
      if (first) {
        seen[0] += bits > 0;
        seen[1] += bits >= kInfinity<G>;
        if (counts) special.add(g);
      }
      // Zeros, often many, would queue for one bin; they are the last in rank and need none.
      if (bits > 0 && bits >> above == prefix) {
        atomicAdd(bins + ((bits >> shift) & ((1 << width) - 1)), 1u);
      }
    });
    if (first) {
      if (counts) special.add_to(counts);
      combine_block(seen, Add{});
      if (seen[1] > 0 || seen[0] == 0) return none;
      if (seen[0] < k) return {1, int64_t(seen[0])};
    }
    __syncthreads();
    digit = find_digit(bins, rank);
    prefix = prefix << width | digit.value;
    rank = digit.rank;
  }
  return {prefix, int64_t(k) - digit.rank + digit.count};
}

template <class T, class G>
struct L1 {
  using C = Compute<T>;
  Operands<T, G> here;
  int64_t length;
  uint64_t threshold;
  C share;

  // adv, moved by the share along the sign of the gradient if it is chosen.
  __device__ C moved(T adv, G grad) const {
    const auto g = load(grad);
    const C step = g > 0 ? share : -share;
    return load(adv) + (magnitude_bits(g) >= threshold ? step : C(0));
  }

  // Calls f with every element's |moved - x|.
  template <class F>
  __device__ void for_distances(F f) const {
    for_elements<kVector<T, G>>(length, here.vectors, [&](int64_t i, auto count) {
      const auto adv = load_vector<count.value>(here.adv + i);
      const auto grad = load_vector<count.value>(here.grad + i);
      const auto x = load_vector<count.value>(here.x + i);
#pragma unroll
      for (int k = 0; k < count.value; ++k) {
        f(abs_(moved(adv.at[k], grad.at[k]) - load(x.at[k])));
      }
    });
  }

  __device__ void write(double theta, C low, C high) const {
    for_elements<kVector<T, G>>(length, here.vectors, [&](int64_t i, auto count) {
      constexpr int kCount = count.value;
      const auto adv = load_vector<kCount>(here.adv + i);
      const auto grad = load_vector<kCount>(here.grad + i);
      const auto x = load_vector<kCount>(here.x + i);
      Vector<T, kCount> out;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        C to = moved(adv.at[k], grad.at[k]);
        const C centre = load(x.at[k]), delta = to - centre;
        C left = C(double(abs_(delta)) - theta);
        left = left > 0 ? left : C(0);
        if (theta > 0) to = centre + (delta < 0 ? -left : left);
        out.at[k] = rounded<T>(clip(to, low, high));
      }
      store_vector(here.out + i, out);
    });
  }

  static __device__ float abs_(float v) { return fabsf(v); }
  static __device__ double abs_(double v) { return fabs(v); }
};

// A number whose last bit is a multiple of 2^(head - 52) of the largest distance, 2^head >= n: what
// it is added to and subtracted from is rounded to such multiples, of which every sum is exact.
// Doubles, which need all their bits, are left alone.
template <class C>
__device__ double summation_grid(double largest, int head) {
  if constexpr (std::is_same_v<C, double>) return 0;
  const long long exponent = __double_as_longlong(largest) >> 52;
  return __longlong_as_double((exponent + 1 + head) << 52 | 1LL << 51);
}

// Michelot's iteration: theta is the mean excess over the distances above it; 0 inside the ball.
template <class T, class G>
__device__ double soft_threshold(const L1<T, G>& l1, double radius, int head) {
  double largest[1] = {0};
  l1.for_distances([&](auto d) { largest[0] = Larger{}(largest[0], double(d)); });
  combine_block(largest, Larger{});
  if (!isfinite(largest[0])) return 0;
  const double grid = summation_grid<Compute<T>>(largest[0], head);
  double theta = 0, total = 0, above = 0;  // sum and number of the distances above theta
  while (true) {
    double sums[2] = {0, 0};
    l1.for_distances([&](auto d) {
      const double term = (double(d) + grid) - grid;
      const bool below = term <= theta;  // a NaN is not
      sums[0] += below ? 0 : term;
      sums[1] += below ? 0 : 1;
    });
    combine_block(sums, Add{});
    if (above == 0) {
      if (!(sums[0] > radius && isfinite(sums[0]))) return 0;
      if (radius == 0) return HUGE_VAL;
    } else if (sums[1] == 0 || sums[1] >= above) {
      return theta;
    }
    total = sums[0];
    above = sums[1];
    theta = (total - radius) / above;
  }
}

template <class T, class G>
__global__ void __launch_bounds__(kThreads, 1)
    step_l1(Operands<T, G> all, int64_t size, unsigned k, int head, PerSample eps, PerSample alpha,
            double low, double high, const bool* active, int64_t* counts) {
  using C = Compute<T>;
  const int64_t sample = blockIdx.x;
  const Operands<T, G> here = all.from(sample * size);
  if (!is_active(active, sample)) return copy_block(here, size);
  const Chosen chosen = choose(here.grad, size, here.vectors, k, counts);
  // eps and alpha are rounded to the dtype of computation, as every backend does.
  const double step = C(number_of(alpha, sample)), radius = C(number_of(eps, sample));
  const C share = chosen.count ? C(step / double(chosen.count)) : C(0);
  const L1<T, G> l1{here, size, chosen.threshold, share};
  l1.write(soft_threshold(l1, radius, head), C(low), C(high));
}

}  // namespace

cudaError_t launch_pgd_step_l1(const PgdStep& s, cudaStream_t stream) {
  if (s.batch * s.size == 0) return cudaSuccess;
  const int64_t spared = int64_t(std::floor(s.sparsity * double(s.size)));
  const unsigned k = unsigned(s.size > spared ? s.size - spared : 1);
  int head = 2;
  while (int64_t(1) << head < s.size) ++head;
  return dispatch_step(s, [&](auto t, auto g) {
    using T = typename decltype(t)::type;
    using G = typename decltype(g)::type;
    step_l1<T, G><<<unsigned(s.batch), kThreads, 0, stream>>>(operands<T, G>(s, s.size), s.size, k,
                                                              head, s.eps, s.alpha, s.low, s.high,
                                                              s.active, s.counts);
    return cudaGetLastError();
  });
}

}  // namespace fastadv::cuda
