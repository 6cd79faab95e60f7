// Losses on logits on the CPU: value and gradients in one pass over the rows. Definitions:
// fastadv/ops/softmax_formulas.py.
#include "cpu/softmax_losses.h"

#include <ATen/ops/empty.h>

#include "cpu/softmax_kinds.h"
#include "cpu/tensor.h"

namespace fastadv {
namespace {

constexpr int64_t kRowGrain = 8192;  // logits a task works on: it is exponentials that take time

template <class T, class C>
FASTADV_INLINE void scale_row(T* to, const C* from, C factor, int classes) {
  for (int i = 0; i < classes; ++i) store(to[i], factor * from[i]);
}

// The arguments of a kind of loss, the number of its losses, and its own number. The same as in
// KINDS of fastadv/ops/softmax_formulas.py.
struct Kind {
  c10::string_view name;
  bool takes_other, takes_labels;
  int64_t fewest_classes, losses;
  int number;
};

constexpr Kind kKinds[] = {
    {"cross_entropy", false, true, 1, 1, SoftmaxKinds::number_of<CrossEntropy>()},
    {"boosted_cross_entropy", false, true, 2, 1, SoftmaxKinds::number_of<BoostedCrossEntropy>()},
    {"cw", false, true, 2, 1, SoftmaxKinds::number_of<Margin>()},
    {"dlr", false, true, 3, 1, SoftmaxKinds::number_of<LogitsRatio>()},
    {"kl", true, false, 1, 1, SoftmaxKinds::number_of<Divergence>()},
    {"trades", true, true, 1, 1, SoftmaxKinds::number_of<Trades>()},
    {"mart", true, true, 2, 1, SoftmaxKinds::number_of<Mart>()},
    {"alp", true, true, 1, 1, SoftmaxKinds::number_of<LogitPairing>()},
    {"act", true, true, 1, 2, SoftmaxKinds::number_of<Cooperative>()},
};

const Kind& kind_of(c10::string_view name) {
  for (const Kind& kind : kKinds) {
    if (kind.name == name) return kind;
  }
  TORCH_CHECK_VALUE(false, "kind must be a loss on logits, got ", name);
}

void check(const Kind& kind, const at::Tensor& logits, const OptionalTensor& other,
           const OptionalTensor& y) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= kind.fewest_classes,
                    "logits must have shape [B, C] with C >= ", kind.fewest_classes, ", got ",
                    logits.sizes());
  TORCH_CHECK_VALUE(other.has_value() == kind.takes_other, "other must ",
                    kind.takes_other ? "be given" : "be None", " for ", kind.name);
  if (other) check_shape(*other, "other", logits, "logits");
  TORCH_CHECK_VALUE(y.has_value() == kind.takes_labels, "y must ",
                    kind.takes_labels ? "be given" : "be None", " for ", kind.name);
  TORCH_CHECK_VALUE(!y || (y->scalar_type() == at::kLong && y->dim() == 1 &&
                           y->size(0) == logits.size(0) && y->device().is_cpu()),
                    "y must be int64 of shape [", logits.size(0), "] on the CPU");
}

void* memory_of(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

void compute(const Kind& kind, at::ScalarType type, const SoftmaxOperands& o) {
  RunRows rows = nullptr;
  dispatch_float(type, "logits", [&](auto t) { rows = rows_of<decltype(t)>(kind.number); });
  at::parallel_for(0, o.batch, std::max<int64_t>(1, kRowGrain / o.classes),
                   [&](int64_t begin, int64_t end) { rows(o, begin, end); });
}

// The means of [B, k] over the batch, [k].
template <class C>
void fill_means(const at::Tensor& means, const at::Tensor& losses) {
  const int64_t batch = losses.size(0), count = losses.size(1);
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < batch; ++i) sum += data<C>(losses)[i * count + k];
    data<C>(means)[k] = C(sum / double(batch));
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_losses(
    const at::Tensor& logits, const OptionalTensor& other, const OptionalTensor& y,
    c10::string_view kind_name, double weight, double temperature, bool mean, bool wanted,
    bool other_wanted) {
  const Kind& kind = kind_of(kind_name);
  check(kind, logits, other, y);
  const auto type =
      other ? c10::promoteTypes(logits.scalar_type(), other->scalar_type()) : logits.scalar_type();
  const auto options = logits.options()
                           .dtype(type == at::kDouble ? at::kDouble : at::kFloat)
                           .memory_format(std::nullopt);
  const int64_t batch = logits.size(0), pair = kind.losses;
  const bool write = wanted, write_other = other_wanted && other;
  const at::Tensor rows = logits.to(type).contiguous();
  const at::Tensor other_rows = other ? other->to(type).contiguous() : at::Tensor();
  const at::Tensor labels = y ? y->contiguous() : at::Tensor();
  at::Tensor losses = at::empty({batch, pair}, options);
  const at::Tensor gradient = write ? at::empty(logits.sizes(), options) : at::Tensor();
  const at::Tensor other_gradient = write_other ? at::empty(logits.sizes(), options) : at::Tensor();
  compute(kind, type,
          {.logits = memory_of(rows),
           .other = memory_of(other_rows),
           .y = y ? labels.const_data_ptr<int64_t>() : nullptr,
           .losses = memory_of(losses),
           .gradient = memory_of(gradient),
           .other_gradient = memory_of(other_gradient),
           .batch = batch,
           .classes = int(logits.size(1)),
           .losses_per_sample = pair,
           .weight = weight,
           .temperature = temperature,
           .gradient_scale = mean ? 1 / double(batch) : 1});
  if (mean) {
    const at::Tensor means = pair == 2 ? at::empty({2}, options) : at::empty({}, options);
    options.dtype() == at::kDouble ? fill_means<double>(means, losses)
                                   : fill_means<float>(means, losses);
    losses = means;
  } else if (pair == 1) {
    losses = losses.view({batch});
  }
  const auto or_empty = [&](const at::Tensor& t) {
    return t.defined() ? t : at::empty({batch, 0}, options);
  };
  return {losses, or_empty(gradient), or_empty(other_gradient)};
}

at::Tensor softmax_losses_backward(const at::Tensor& grad, const at::Tensor& gradient,
                                   at::ScalarType dtype) {
  TORCH_CHECK_VALUE(gradient.dim() == 2, "gradient must have shape [B, C], got ", gradient.sizes());
  const int64_t batch = gradient.size(0), classes = gradient.size(1);
  TORCH_CHECK_VALUE(grad.dim() == 0 || grad.sizes() == at::IntArrayRef{batch},
                    "grad must be one number or have shape [", batch, "], got ", grad.sizes());
  const at::Tensor from = gradient.contiguous(), slopes = grad.to(from.scalar_type()).contiguous();
  at::Tensor out = at::empty(gradient.sizes(), from.options().dtype(dtype));
  const int64_t stride = grad.dim(),
                grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, classes));
  const auto rows = [&](auto c, auto t) {
    using C = decltype(c);
    using T = decltype(t);
    const C *in = data<C>(from), *slope = data<C>(slopes);
    T* to = data<T>(out);
    at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const C factor = slope[i * stride];
        FASTADV_DISPATCH(scale_row(to + i * classes, in + i * classes, factor, int(classes)));
      }
    });
  };
  if (from.scalar_type() == at::kDouble) {
    dispatch_float(dtype, "dtype", [&](auto t) { rows(double{}, t); });
  } else {
    TORCH_CHECK_TYPE(from.scalar_type() == at::kFloat, "gradient must be float32 or float64, got ",
                     from.scalar_type());
    dispatch_float(dtype, "dtype", [&](auto t) { rows(float{}, t); });
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("softmax_losses", &softmax_losses);
  m.impl("softmax_losses_backward", &softmax_losses_backward);
}

}  // namespace fastadv
