// The linf step with numbers per image and channel on the CPU. Formula:
// fastadv/ops/pgd_step_per_channel.py.
#include <optional>
#include <vector>

#include "cpu/pgd_step.h"

namespace fastadv {
namespace {

// A channel's elements lie in runs. Those of fewer elements than this are stepped together with the
// other channels', each element by numbers of its own.
constexpr int64_t kShortRun = 64;
constexpr int64_t kTile = 512;  // elements at least that are stepped together

// Eps, alpha, lowest and highest value per image and channel.
template <class C>
class Numbers {
 public:
  explicit Numbers(const at::Tensor& limits)
      : first_(data<C>(limits)), stride_(limits.stride(0)), channels_(limits.size(1)) {}
  Limits<C> at(int64_t sample, int64_t channel) const {
    const C* n = first_ + sample * stride_ + channel * 4;
    return {n[0], n[1], n[2], n[3]};
  }
  int64_t channels() const { return channels_; }
  bool same_for_all() const { return stride_ == 0; }

 private:
  const C* first_;
  int64_t stride_, channels_;
};

// The numbers of a sample's elements 0 .. period - 1, again and again.
template <class C>
class Tile {
 public:
  Tile(const Numbers<C>& numbers, int64_t sample, int64_t run) {
    const int64_t period = run * numbers.channels();
    size_ = (kTile + period - 1) / period * period;
    values_.resize(4 * size_);
    for (int64_t channel = 0, i = 0; i < size_; channel = (channel + 1) % numbers.channels()) {
      const Limits<C> n = numbers.at(sample, channel);
      for (const int64_t end = i + run; i < end; ++i) {
        values_[i] = n.eps;
        values_[size_ + i] = n.alpha;
        values_[2 * size_ + i] = n.low;
        values_[3 * size_ + i] = n.high;
      }
    }
  }
  int64_t size() const { return size_; }
  const C* eps() const { return values_.data(); }
  const C* alpha() const { return values_.data() + size_; }
  const C* low() const { return values_.data() + 2 * size_; }
  const C* high() const { return values_.data() + 3 * size_; }

 private:
  int64_t size_;
  std::vector<C> values_;
};

template <class T, class G, class C = Compute<T>>
FASTADV_INLINE void step_elements(T* out, const T* adv, const G* grad, const T* x, const C* eps,
                                  const C* alpha, const C* low, const C* high, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Limits<C> limits{eps[i], alpha[i], low[i], high[i]};
    store(out[i], linf_moved(load(adv[i]), load(grad[i]), load(x[i]), limits));
  }
}

// What is done to elements `begin` to `end` of a sample whose first ones are at these addresses:
// run by run, or tile by tile.
template <class T, class G>
void step_runs(T* out, const T* adv, const G* grad, const T* x, const Numbers<Compute<T>>& numbers,
               int64_t sample, int64_t run, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end;) {
    const int64_t channel = i / run % numbers.channels();
    const int64_t length = std::min(end, i / run * run + run) - i;
    const auto limits = numbers.at(sample, channel);
    FASTADV_DISPATCH(step_linf(out + i, adv + i, grad + i, x + i, limits, length));
    i += length;
  }
}

template <class T, class G>
void step_tiles(T* out, const T* adv, const G* grad, const T* x, const Tile<Compute<T>>& tile,
                int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end;) {
    const int64_t from = i % tile.size(), length = std::min(end - i, tile.size() - from);
    FASTADV_DISPATCH(step_elements(out + i, adv + i, grad + i, x + i, tile.eps() + from,
                                   tile.alpha() + from, tile.low() + from, tile.high() + from,
                                   length));
    i += length;
  }
}

template <class T, class G>
void step_batch(const PgdImages& images, const at::Tensor& limits, const Active& active) {
  using C = Compute<T>;
  const Numbers<C> numbers(limits);
  const int64_t size = sample_size(images.adv);
  if (size == 0) return;
  // In a dense layout, whatever the order of its axes, the channel changes every so many elements.
  const int64_t run = numbers.channels() > 1 ? images.adv.stride(1) : size;
  std::optional<Tile<C>> shared;
  if (run < kShortRun && numbers.same_for_all()) shared.emplace(numbers, 0, run);
  parallel_over_samples(images.adv.size(0), size, [&](int64_t sample, int64_t begin, int64_t end) {
    const int64_t at = sample * size;
    T* out = data<T>(images.out) + at;
    const T *adv = data<T>(images.adv) + at, *x = data<T>(images.x) + at;
    const G* grad = data<G>(images.grad) + at;
    if (!active[sample]) return copy_elements(out + begin, adv + begin, end - begin);
    if (run >= kShortRun) {
      return step_runs(out, adv, grad, x, numbers, sample, run, begin, end);
    }
    if (shared) return step_tiles(out, adv, grad, x, *shared, begin, end);
    step_tiles(out, adv, grad, x, Tile<C>(numbers, sample, run), begin, end);
  });
}

// The numbers in the dtype of computation, those of a channel side by side.
at::Tensor checked_limits(const at::Tensor& limits, const at::Tensor& adv) {
  TORCH_CHECK_VALUE(adv.dim() > 1, "adv must have a channel axis, got shape ", adv.sizes());
  TORCH_CHECK_VALUE((limits.sizes() == at::IntArrayRef{adv.size(0), adv.size(1), 4}),
                    "limits must have shape [", adv.size(0), ", ", adv.size(1), ", 4], got ",
                    limits.sizes());
  check_device(limits, "limits", adv);
  const auto type = adv.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor numbers = limits.to(type);
  return numbers.stride(2) == 1 && numbers.stride(1) == 4 ? numbers : numbers.contiguous();
}

void step_into(const PgdImages& images, const at::Tensor& limits, const Active& active) {
  dispatch_step(images, [&](auto t, auto g) {
    step_batch<decltype(t), decltype(g)>(images, limits, active);
  });
}

at::Tensor pgd_step_per_channel(const at::Tensor& adv, const at::Tensor& grad, const at::Tensor& x,
                                const at::Tensor& limits, const OptionalTensor& active) {
  check_images(adv, grad, x);
  const at::Tensor numbers = checked_limits(limits, adv);
  const Active chosen(active, adv);
  return stepped(adv, grad, x,
                 [&](const PgdImages& images) { step_into(images, numbers, chosen); });
}

void pgd_step_per_channel_(at::Tensor adv, const at::Tensor& grad, const at::Tensor& x,
                           const at::Tensor& limits, const OptionalTensor& active,
                           const OptionalTensor& counts) {
  check_images(adv, grad, x);
  const at::Tensor numbers = checked_limits(limits, adv);
  const Active chosen(active, adv);
  if (counts) check_counts(*counts, adv);
  step_in_place(adv, grad, x, chosen, counts,
                [&](const PgdImages& images) { step_into(images, numbers, chosen); });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("pgd_step_per_channel", &pgd_step_per_channel);
  m.impl("pgd_step_per_channel_", &pgd_step_per_channel_);
}

}  // namespace fastadv
