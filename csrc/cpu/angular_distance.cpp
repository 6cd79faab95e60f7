// Angular distance and the replay switch on the CPU. Definition: fastadv/ops/angular_distance.py.
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "cpu/sum.h"
#include "cpu/tensor.h"

namespace fastadv {
namespace {

constexpr int64_t kPart =
    16384;  // elements summed by one task; fixed, so that threads do not change the sum

using Moments = std::array<double, 3>;  // u.v, u.u, v.v

template <class T>
FASTADV_CLONES Moments moments_of(const T* u, const T* v, int64_t n) {
  using C = Compute<T>;
  return sums<C, 3>(n, [&](int64_t i) {
    const C a = load(u[i]), b = load(v[i]);
    return std::array<C, 3>{a * b, a * a, b * b};
  });
}

// A pair of batch-major tensors of one dtype and layout.
struct Pair {
  at::Tensor u, v;
};

Pair aligned(const at::Tensor& u, const at::Tensor& v) {
  TORCH_CHECK_VALUE(u.dim() > 0, "u must have a batch axis, got a tensor without axes");
  check_shape(v, "v", u, "u");
  const bool wide = u.scalar_type() == at::kDouble || v.scalar_type() == at::kDouble;
  const auto dtype = u.scalar_type() == v.scalar_type() ? u.scalar_type()
                     : wide                             ? at::kDouble
                                                        : at::kFloat;
  const at::Tensor a = batch_major(u.to(dtype));
  return {a, in_layout_of(v.to(dtype), a)};
}

// [B, 3]: u.v, u.u, v.v of each sample.
template <class T>
void fill_moments(const Pair& pair, const at::Tensor& moments) {
  using C = Compute<T>;
  const int64_t batch = pair.u.size(0), size = sample_size(pair.u);
  const int64_t parts = (size + kPart - 1) / kPart;
  std::vector<Moments> partial(batch * parts);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(size, kPart)));
  at::parallel_for(0, batch * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % parts * kPart, at = i / parts * size + first;
      partial[i] =
          moments_of(data<T>(pair.u) + at, data<T>(pair.v) + at, std::min(kPart, size - first));
    }
  });
  C* out = data<C>(moments);
  for (int64_t i = 0; i < batch; ++i) {
    Moments sum = {};
    for (int64_t p = 0; p < parts; ++p) {
      for (int k = 0; k < 3; ++k) sum[k] += partial[i * parts + p][k];
    }
    for (int k = 0; k < 3; ++k) out[3 * i + k] = C(sum[k]);
  }
}

template <class C>
C length_of(const C* moments) {
  return std::sqrt(moments[1]) * std::sqrt(moments[2]);
}

template <class C>
void fill_distance(const at::Tensor& moments, const at::Tensor& distance) {
  const C* m = data<C>(moments);
  C* d = data<C>(distance);
  for (int64_t i = 0; i < distance.numel(); ++i) {
    const C length = length_of(m + 3 * i);
    const C distance = length == 0 ? C(1) : 1 - std::abs(m[3 * i]) / length;
    d[i] = distance < 0 ? C(0) : distance;  // rounding can carry it below; a NaN stays
  }
}

std::tuple<at::Tensor, at::Tensor> angular_distance(const at::Tensor& u, const at::Tensor& v) {
  const Pair pair = aligned(u, v);
  const auto dtype = pair.u.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor distance =
      at::empty({u.size(0)}, u.options().dtype(dtype).memory_format(std::nullopt));
  at::Tensor moments = at::empty({u.size(0), 3}, distance.options());
  dispatch_float(pair.u.scalar_type(), "u", [&](auto t) {
    using T = decltype(t);
    fill_moments<T>(pair, moments);
    fill_distance<Compute<T>>(moments, distance);
  });
  return {distance, moments};
}

std::tuple<at::Tensor, at::Tensor> replay_mask(const at::Tensor& u, const at::Tensor& v,
                                               double tau) {
  const at::Tensor distance = std::get<0>(angular_distance(u, v));
  return {distance, distance.gt(tau)};
}

template <class T>
FASTADV_CLONES void combine(T* out, const T* u, const T* v, Compute<T> along_u, Compute<T> along_v,
                            int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(out[i], along_u * load(u[i]) + along_v * load(v[i]));
}

template <class T>
void fill_gradient(const at::Tensor& out, const Pair& pair, const at::Tensor& grad,
                   const at::Tensor& moments) {
  using C = Compute<T>;
  const int64_t size = sample_size(pair.u);
  const C *g = data<C>(grad), *m = data<C>(moments);
  parallel_over_samples(pair.u.size(0), size, [&](int64_t sample, int64_t begin, int64_t end) {
    const C dot = m[3 * sample], uu = m[3 * sample + 1], length = length_of(m + 3 * sample);
    const C sign = dot > 0 ? C(1) : dot < 0 ? C(-1) : C(0);
    const C along_v = length == 0 ? C(0) : -g[sample] * sign / length;
    const C along_u = length == 0 ? C(0) : -along_v * dot / uu;
    const int64_t at = sample * size + begin;
    combine(data<T>(out) + at, data<T>(pair.u) + at, data<T>(pair.v) + at, along_u, along_v,
            end - begin);
  });
}

at::Tensor angular_distance_backward(const at::Tensor& grad, const at::Tensor& u,
                                     const at::Tensor& v, const at::Tensor& moments) {
  const Pair pair = aligned(u, v);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef{u.size(0)}, "grad must have shape [", u.size(0),
                    "], got ", grad.sizes());
  TORCH_CHECK_VALUE(moments.sizes() == at::IntArrayRef({u.size(0), 3}), "moments must have shape [",
                    u.size(0), ", 3], got ", moments.sizes());
  const auto dtype = pair.u.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor out = at::empty_like(pair.u);
  dispatch_float(pair.u.scalar_type(), "u", [&](auto t) {
    fill_gradient<decltype(t)>(out, pair, grad.to(dtype).contiguous(),
                               moments.to(dtype).contiguous());
  });
  at::Tensor result = at::empty_like(u);
  const bool direct = result.scalar_type() == out.scalar_type() && same_layout(result, out);
  return direct ? out : result.copy_(out);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("angular_distance", &angular_distance);
  m.impl("angular_distance_backward", &angular_distance_backward);
  m.impl("replay_mask", &replay_mask);
}

}  // namespace fastadv
