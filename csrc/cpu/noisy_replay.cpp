// ARREST's noisy replay on the CPU. Definition: fastadv/ops/noisy_replay.py.
#include <cstring>

#include "cpu/noise.h"

namespace fastadv {
namespace {

at::Tensor noisy_replay(const at::Tensor& x, const at::Tensor& adv, const at::Tensor& distance,
                        double tau, double eps, const OptionalTensor& eps_per_sample, double low,
                        double high, int64_t seed, const OptionalTensor& sample_ids) {
  check_replay(x, adv, distance);
  const int64_t batch = x.size(0), size = sample_size(x);
  const PerSample radius(eps, eps_per_sample, x, "eps_per_sample");
  const at::Tensor ids = checked_ids(sample_ids, x);
  const at::Tensor replayed = distance.gt(tau).contiguous();
  at::Tensor out = at::empty_like(x);
  auto layout = sample_layout(x);
  if (layout && !same_layout(out, x)) layout.reset();
  const at::Tensor clean = layout ? x : x.contiguous();
  const at::Tensor attacked = in_layout_of(adv, clean);
  const at::Tensor to = layout ? out : at::empty_like(clean);
  const SampleLayout walk = layout.value_or(SampleLayout{1, size, 0, 1});
  if (size > 0) {
    const bool* replay = replayed.const_data_ptr<bool>();
    dispatch_float(x.scalar_type(), "x", [&](auto t) {
      using T = decltype(t);
      at::parallel_for(0, batch, std::max<int64_t>(1, kGrain / size), [&](int64_t b, int64_t e) {
        for (int64_t i = b; i < e; ++i) {
          T* o = data<T>(to) + i * size;
          if (!replay[i]) {
            std::memcpy(o, data<T>(attacked) + i * size, size * sizeof(T));
            continue;
          }
          const Key key{uint64_t(seed), sample_id(ids_pointer(ids), i), 0};
          const NoiseLimits limits{radius[i], low, high};
          linf_noise_sample(o, data<T>(clean) + i * size, walk, key, limits);
        }
      });
    });
  }
  return layout ? out : out.copy_(to);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("noisy_replay", &noisy_replay); }

}  // namespace fastadv
