// Uniform noise in the eps-ball on the CPU. Definition: fastadv/ops/random_start.py.
#include "cpu/noise.h"

namespace fastadv {
namespace {

// The balls whose noise is a random direction of random length: how words become directions, and
// what of the direction is added up to its length. All of it exact integers.
struct L2 {
  static FASTADV_INLINE int32_t element(uint32_t word) { return near_gaussian(word); }
  static FASTADV_INLINE int32_t term(int32_t element) { return element * element; }
  static double length(int64_t sum) { return std::sqrt(double(sum)); }
};
struct L1 {
  static FASTADV_INLINE int32_t element(uint32_t word) { return near_laplace(word); }
  static FASTADV_INLINE int32_t term(int32_t element) { return std::abs(element); }
  static double length(int64_t sum) { return double(sum); }
};

// Sum of the direction's terms and largest 24-bit number of the radius stream.
struct BallDraw {
  int64_t sum = 0;
  uint32_t largest = 0;
};

template <class Ball>
FASTADV_INLINE BallDraw measure(const uint32_t* direction, const uint32_t* radius, int64_t n) {
  int64_t sum = 0;
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += Ball::term(Ball::element(direction[i]));
    largest = std::max(largest, radius[i] >> 8);
  }
  return {sum, largest};
}

template <class Ball>
BallDraw measure_sample(int64_t size, Key key) {
  uint32_t direction[kChunk], radius[kChunk];
  BallDraw all;
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    key.stream = 0;
    FASTADV_DISPATCH(fill_words(direction, begin, key));
    key.stream = kRadiusStream;
    FASTADV_DISPATCH(fill_words(radius, begin, key));
    const int64_t count = std::min<int64_t>(kChunk, size - begin);
    const BallDraw part = FASTADV_DISPATCH(measure<Ball>(direction, radius, count));
    all.sum += part.sum;
    all.largest = std::max(all.largest, part.largest);
  }
  return all;
}

template <class Ball, class T>
FASTADV_INLINE void add_direction(T* out, const T* x, const uint32_t* words, int64_t count,
                                  int64_t stride, Compute<T> scale, NoiseLimits limits) {
  using C = Compute<T>;
  const C low = C(limits.low), high = C(limits.high);
  for (int64_t i = 0; i < count; ++i) {
    C moved = load(x[i * stride]) + C(Ball::element(words[i])) * scale;
    moved = moved < low ? low : moved;
    store(out[i * stride], moved > high ? high : moved);
  }
}

template <class Ball, class T>
void ball_noise_sample(T* out, const T* x, const SampleLayout& layout, const Key& key,
                       const NoiseLimits& limits) {
  using C = Compute<T>;
  const int64_t size = layout.planes * layout.plane_size;
  const BallDraw draw = measure_sample<Ball>(size, key);
  const double share = double(draw.largest + 1) * 0x1p-24;
  const C scale = draw.sum ? C(share * limits.eps / Ball::length(draw.sum)) : C(0);
  uint32_t words[kChunk];
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    FASTADV_DISPATCH(fill_words(words, begin, key));
    for_runs(
        layout, begin, std::min(begin + kChunk, size),
        [&](int64_t index, int64_t offset, int64_t count) {
          FASTADV_DISPATCH(add_direction<Ball>(out + offset, x + offset, words + (index - begin),
                                               count, layout.element_stride, scale, limits));
        });
  }
}

at::Tensor random_start(const at::Tensor& x, double eps, const OptionalTensor& eps_per_sample,
                        c10::string_view norm, double low, double high, int64_t seed,
                        const OptionalTensor& sample_ids) {
  check_batched(x, "x");
  check_norm(norm);
  const int64_t batch = x.size(0), size = sample_size(x);
  const PerSample radius(eps, eps_per_sample, x, "eps_per_sample");
  const at::Tensor ids = checked_ids(sample_ids, x);
  at::Tensor out = at::empty_like(x);
  auto layout = sample_layout(x);
  if (layout && !same_layout(out, x)) layout.reset();
  const at::Tensor from = layout ? x : x.contiguous();
  const at::Tensor to = layout ? out : at::empty_like(from);
  const SampleLayout walk = layout.value_or(SampleLayout{1, size, 0, 1});
  if (size > 0) {
    dispatch_float(x.scalar_type(), "x", [&](auto t) {
      using T = decltype(t);
      const auto draw = norm == "linf" ? linf_noise_sample<T>
                        : norm == "l2" ? ball_noise_sample<L2, T>
                                       : ball_noise_sample<L1, T>;
      at::parallel_for(0, batch, std::max<int64_t>(1, kGrain / size), [&](int64_t b, int64_t e) {
        for (int64_t i = b; i < e; ++i) {
          const Key key{uint64_t(seed), sample_id(ids_pointer(ids), i), 0};
          const NoiseLimits limits{radius[i], low, high};
          draw(data<T>(to) + i * size, data<T>(from) + i * size, walk, key, limits);
        }
      });
    });
  }
  return layout ? out : out.copy_(to);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("random_start", &random_start); }

}  // namespace fastadv
