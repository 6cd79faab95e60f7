// Losses on logits on the CPU: value and gradients in one pass over the rows. Definitions:
// fastadv/ops/softmax_formulas.py.
#include <ATen/ops/empty.h>

#include <cstring>
#include <vector>

#include "cpu/softmax_kinds.h"
#include "cpu/tensor.h"

namespace fastadv {
namespace {

constexpr int64_t kRowGrain = 8192;  // logits a task works on: it is exponentials that take time

// Reads a row into `to`, whose gradient is to go to `gradient`, which may be null.
template <class V, class T, class C = Element<V>>
FASTADV_INLINE Logits<C> load_row(C* to, const T* from, const C* gradient, int classes, int width) {
  constexpr int kStep = kLanesOf<V>;
  V most = V{} + kMinusInfinity<C>;
  int done = 0;
  if constexpr (std::is_same_v<T, C>) {
    for (; done + kStep <= classes; done += kStep) {
      const V v = lanes_at<V>(from + done);
      set_lanes<V>(to + done, v);
      most = larger(v, most);
    }
  }
  for (int i = done; i < classes; ++i) to[i] = load(from[i]);
  for (int i = classes; i < width; ++i) to[i] = kMinusInfinity<C>;
  for (; done < width; done += kStep) most = larger(lanes_at<V>(to + done), most);
  const auto larger_one = [](V a, V b) __attribute__((always_inline)) { return larger(a, b); };
  return {to,
          fold_lanes(most, larger_one),
          {reinterpret_cast<uintptr_t>(from + classes),
           reinterpret_cast<uintptr_t>(gradient ? gradient : to), sizeof(T), sizeof(C)}};
}

template <class T, class C>
FASTADV_INLINE void scale_row(T* to, const C* from, C factor, int classes) {
  for (int i = 0; i < classes; ++i) store(to[i], factor * from[i]);
}

// `other` is null for the losses of one row of logits.
template <class Kind, class T, class V>
FASTADV_INLINE void compute_row(Row<V>& row, const T* logits, const T* other) {
  row.logits = load_row<V>(row.logits.at, logits, row.gradient, row.classes, row.width);
  if (!other) return Kind::row(row);
  row.other = load_row<V>(row.other.at, other, row.other_gradient, row.classes, row.width);
  Kind::row(row);
}

template <class C>
using Narrow = Vector<C, 32>;
using Wide = Vector<float, 64>;

template <class Kind, class T>
FASTADV_AVX512_ONLY void compute_wide_row(Row<Wide>& row, const T* logits, const T* other) {
  compute_row<Kind>(row, logits, other);
}

// The tensors of a call; what is not there is undefined.
struct Operands {
  at::Tensor logits, other, y;          // [B, C], [B, C], [B], contiguous, logits of one dtype
  at::Tensor losses;                    // [B, 1 or 2], in the dtype of computation
  at::Tensor gradient, other_gradient;  // [B, C], in the dtype of computation
  double weight, temperature, gradient_scale;
};

// The label of a sample; 0 where there are none.
int label(const int64_t* y, int64_t sample, int classes) {
  if (!y) return 0;
  TORCH_CHECK_INDEX(y[sample] >= 0 && y[sample] < classes, "y must lie in 0 .. ", classes - 1,
                    ", got ", y[sample], " at sample ", sample);
  return int(y[sample]);
}

// Row i of a tensor, null for an undefined one; and the row after it.
template <class T>
T* row_of(const at::Tensor& t, int64_t i) {
  return t.defined() ? data<T>(t) + i * t.size(1) : nullptr;
}

template <class T>
T* next_row(T* row, int classes) {
  return row ? row + classes : row;
}

template <class Kind, class T, class V>
void run_rows(const Operands& o, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t per_sample = o.losses.size(1);
  const int classes = int(o.logits.size(1));
  const int width = (classes + kRowLanes - 1) / kRowLanes * kRowLanes;
  std::vector<C> scratch(int64_t(2 + kScratchRows) * width);
  Row<V> row{.logits = {scratch.data()},
             .other = {scratch.data() + width},
             .scratch = scratch.data() + 2 * width,
             .classes = classes,
             .width = width,
             .weight = C(o.weight),
             .temperature = C(o.temperature),
             .gradient = row_of<C>(o.gradient, begin),
             .other_gradient = row_of<C>(o.other_gradient, begin),
             .gradient_scale = C(o.gradient_scale)};
  const T *logits = row_of<T>(o.logits, begin), *other = row_of<T>(o.other, begin);
  const int64_t* y = o.y.defined() ? o.y.const_data_ptr<int64_t>() : nullptr;
  C* losses = data<C>(o.losses);
  for (int64_t i = begin; i < end; ++i) {
    row.y = label(y, i, classes);
    const auto compute = [&]() __attribute__((always_inline)) {
      compute_row<Kind>(row, logits, other);
    };
    if constexpr (std::is_same_v<V, Wide>) {
      compute_wide_row<Kind>(row, logits, other);
    } else if constexpr (std::is_same_v<C, double>) {
      at_simd_level(compute);
    } else {
      below_avx512(compute);  // the wide rows are for AVX-512
    }
    losses[i * per_sample] = row.loss;
    if (per_sample == 2) losses[2 * i + 1] = row.other_loss;
    logits = next_row(logits, classes);
    other = next_row(other, classes);
    row.gradient = next_row(row.gradient, classes);
    row.other_gradient = next_row(row.other_gradient, classes);
  }
}

template <class Kind>
void run(const Operands& o) {
  const int64_t grain = std::max<int64_t>(1, kRowGrain / std::max<int64_t>(1, o.logits.size(1)));
  dispatch_float(o.logits.scalar_type(), "logits", [&](auto t) {
    using T = decltype(t);
    auto* rows = run_rows<Kind, T, Narrow<Compute<T>>>;
    if constexpr (!std::is_same_v<T, double>) {
      if (has_avx512()) rows = run_rows<Kind, T, Wide>;
    }
    at::parallel_for(0, o.logits.size(0), grain,
                     [&](int64_t begin, int64_t end) { rows(o, begin, end); });
  });
}

// The arguments of a kind of loss, the number of its losses, and the function that computes them.
// The same as in KINDS of fastadv/ops/softmax_formulas.py.
struct Kind {
  c10::string_view name;
  bool takes_other, takes_labels;
  int64_t fewest_classes, losses;
  void (*run)(const Operands&);
};

constexpr Kind kKinds[] = {
    {"cross_entropy", false, true, 1, 1, run<CrossEntropy>},
    {"boosted_cross_entropy", false, true, 2, 1, run<BoostedCrossEntropy>},
    {"cw", false, true, 2, 1, run<Margin>},
    {"dlr", false, true, 3, 1, run<LogitsRatio>},
    {"kl", true, false, 1, 1, run<Divergence>},
    {"trades", true, true, 1, 1, run<Trades>},
    {"mart", true, true, 2, 1, run<Mart>},
    {"alp", true, true, 1, 1, run<LogitPairing>},
    {"act", true, true, 1, 2, run<Cooperative>},
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
  Operands o{logits.to(type).contiguous(),
             other ? other->to(type).contiguous() : at::Tensor(),
             y ? y->contiguous() : at::Tensor(),
             at::empty({batch, pair}, options),
             write ? at::empty(logits.sizes(), options) : at::Tensor(),
             write_other ? at::empty(logits.sizes(), options) : at::Tensor(),
             weight,
             temperature,
             mean ? 1 / double(batch) : 1};
  kind.run(o);
  at::Tensor losses = o.losses;
  if (mean) {
    losses = pair == 2 ? at::empty({2}, options) : at::empty({}, options);
    options.dtype() == at::kDouble ? fill_means<double>(losses, o.losses)
                                   : fill_means<float>(losses, o.losses);
  } else if (pair == 1) {
    losses = losses.view({batch});
  }
  const auto or_empty = [&](const at::Tensor& t) {
    return t.defined() ? t : at::empty({batch, 0}, options);
  };
  return {losses, or_empty(o.gradient), or_empty(o.other_gradient)};
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
