// Host side of the passes over rows of channels. Schemas: fastadv/engine/cpu_channels.py.
#include "cpu/conv_tensor.h"
#include "cpu/rows_float.h"

namespace fastadv {
namespace {

using rows::Activation;

void check_processor() {
  TORCH_CHECK_VALUE(conv::supported(), "this operation needs a processor with AVX512-BF16");
}

// Dense, in any order of axes that `like` has too.
template <class Stored = uint16_t>
void check_like(const at::Tensor& t, const char* name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.scalar_type() == conv::kDtype<Stored> && t.sizes() == like.sizes() &&
                        t.strides() == like.strides() && t.is_non_overlapping_and_dense(),
                    name, " must be dense ", conv::kName<Stored>,
                    " with the shape and strides of x, ", like.sizes(), ", got ", t.scalar_type(),
                    " of shape ", t.sizes());
}

// Calls f with a value of the type in which x is stored: a float, or the bits of bfloat16, which
// not every processor has passes for.
template <class F>
void for_dtype(const at::Tensor& x, const F& f) {
  if (x.scalar_type() == at::kFloat) return f(float{});
  check_processor();
  f(uint16_t{});
}

template <class Stored = uint16_t>
Stored* bits(at::Tensor& t) {
  return static_cast<Stored*>(t.data_ptr());
}
template <class Stored = uint16_t>
const Stored* bits(const at::Tensor& t) {
  return static_cast<const Stored*>(t.const_data_ptr());
}

Activation activation(int64_t kind) {
  TORCH_CHECK_VALUE(kind >= 0 && kind < int64_t(Activation::kCount), "kind must be 0 .. ",
                    int64_t(Activation::kCount) - 1, ", got ", kind);
  return Activation(kind);
}

void activation_(at::Tensor out, const at::Tensor& x, int64_t kind) {
  const Activation f = activation(kind);
  for_dtype(x, [&]<class Stored>(Stored) {
    check_like<Stored>(x, "x", x);
    check_like<Stored>(out, "out", x);
    at::parallel_for(
        0, x.numel(), kGrain,
        [&, to = bits<Stored>(out), from = bits<Stored>(x)](int64_t begin, int64_t end) {
          rows::activate(to + begin, from + begin, end - begin, f);
        });
  });
}

void activation_backward_(at::Tensor out, const at::Tensor& gradient, const at::Tensor& x,
                          int64_t kind) {
  const Activation f = activation(kind);
  for_dtype(x, [&]<class Stored>(Stored) {
    check_like<Stored>(x, "x", x);
    check_like<Stored>(out, "out", x);
    check_like<Stored>(gradient, "gradient", x);
    Stored* to = bits<Stored>(out);
    const Stored *g = bits<Stored>(gradient), *from = bits<Stored>(x);
    at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      rows::activate_backward(to + begin, g + begin, from + begin, end - begin, f);
    });
  });
}

rows::Norm norm_of(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                   double eps) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_contiguous(), "x must be contiguous [..., C], got ",
                    x.sizes());
  const int64_t channels = x.size(-1);
  for (const OptionalTensor* t : {&weight, &bias}) {
    TORCH_CHECK_VALUE(!*t || ((*t)->scalar_type() == at::kFloat && (*t)->is_contiguous() &&
                              (*t)->numel() == channels),
                      "weight and bias must be contiguous float32 of shape [", channels, "]");
  }
  return {channels, weight ? weight->const_data_ptr<float>() : nullptr,
          bias ? bias->const_data_ptr<float>() : nullptr, float(eps)};
}

void check_statistics(const at::Tensor& statistics, int64_t count) {
  TORCH_CHECK_VALUE(statistics.scalar_type() == at::kFloat && statistics.is_contiguous() &&
                        statistics.numel() == 2 * count,
                    "statistics must be contiguous float32 of shape [", count, ", 2], got ",
                    statistics.sizes());
}

int64_t row_grain(int64_t channels) { return std::max<int64_t>(1, kGrain / 2 / channels); }

void rows_norm_(at::Tensor out, at::Tensor statistics, const at::Tensor& x,
                const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const rows::Norm norm = norm_of(x, weight, bias, eps);
  for_dtype(x, [&]<class Stored>(Stored) {
    check_like<Stored>(x, "x", x);
    check_like<Stored>(out, "out", x);
    if (x.numel() == 0) return;
    const int64_t count = x.numel() / norm.channels;
    check_statistics(statistics, count);
    float* kept = statistics.data_ptr<float>();
    Stored* to = bits<Stored>(out);
    const Stored* from = bits<Stored>(x);
    at::parallel_for(0, count, row_grain(norm.channels), [&](int64_t begin, int64_t end) {
      const int64_t at = begin * norm.channels;
      rows::layer_norm(to + at, kept + 2 * begin, from + at, norm, end - begin);
    });
  });
}

void rows_norm_backward_(at::Tensor out, const at::Tensor& gradient, const at::Tensor& x,
                         const at::Tensor& statistics, const OptionalTensor& weight,
                         const OptionalTensor& add) {
  const rows::Norm norm = norm_of(x, weight, std::nullopt, 0);
  for_dtype(x, [&]<class Stored>(Stored) {
    check_like<Stored>(x, "x", x);
    check_like<Stored>(out, "out", x);
    check_like<Stored>(gradient, "gradient", x);
    if (add) check_like<Stored>(*add, "add", x);
    if (x.numel() == 0) return;
    const int64_t count = x.numel() / norm.channels;
    check_statistics(statistics, count);
    const float* kept = statistics.const_data_ptr<float>();
    Stored* to = bits<Stored>(out);
    const Stored *g = bits<Stored>(gradient), *from = bits<Stored>(x);
    const Stored* more = conv::stored<Stored>(add);
    at::parallel_for(0, count, row_grain(norm.channels), [&](int64_t begin, int64_t end) {
      const int64_t at = begin * norm.channels;
      rows::layer_norm_backward(to + at, g + at, from + at, kept + 2 * begin,
                                more ? more + at : nullptr, norm, end - begin);
    });
  });
}

// Calls f(image) for the images of a channels-last map with gates [B, C].
template <class Stored, class F>
void for_gates(const at::Tensor& x, const at::Tensor& gate, const F& f) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must have axes [B, C, H, W], got ", x.sizes());
  conv::check_dense<Stored>(x, "x", x.sizes());
  TORCH_CHECK_VALUE(gate.scalar_type() == conv::kDtype<Stored> && gate.is_contiguous() &&
                        gate.sizes() == at::IntArrayRef({x.size(0), x.size(1)}),
                    "gate must be contiguous ", conv::kName<Stored>, " of shape [", x.size(0), ", ",
                    x.size(1), "], got ", gate.scalar_type(), " of shape ", gate.sizes());
  at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) f(image);
  });
}

void channel_gate_(at::Tensor out, const at::Tensor& x, const at::Tensor& gate) {
  for_dtype(x, [&]<class Stored>(Stored) {
    conv::check_dense<Stored>(out, "out", x.sizes());
    const int64_t pixels = x.size(2) * x.size(3), channels = x.size(1);
    Stored* to = bits<Stored>(out);
    const Stored *from = bits<Stored>(x), *g = bits<Stored>(gate);
    for_gates<Stored>(x, gate, [&](int64_t image) {
      const int64_t at = image * pixels * channels;
      rows::gate(to + at, from + at, g + image * channels, pixels, channels);
    });
  });
}

void channel_gate_backward_(at::Tensor out, at::Tensor sums, const at::Tensor& gradient,
                            const at::Tensor& x, const at::Tensor& gate) {
  for_dtype(x, [&]<class Stored>(Stored) {
    conv::check_dense<Stored>(out, "out", x.sizes());
    conv::check_dense<Stored>(gradient, "gradient", x.sizes());
    TORCH_CHECK_VALUE(
        sums.scalar_type() == at::kFloat && sums.is_contiguous() && sums.sizes() == gate.sizes(),
        "sums must be contiguous float32 of shape ", gate.sizes(), ", got ", sums.sizes());
    const int64_t pixels = x.size(2) * x.size(3), channels = x.size(1);
    float* into = sums.data_ptr<float>();
    Stored* to = bits<Stored>(out);
    const Stored *by = bits<Stored>(gradient), *from = bits<Stored>(x), *g = bits<Stored>(gate);
    for_gates<Stored>(x, gate, [&](int64_t image) {
      const int64_t at = image * pixels * channels;
      rows::gate_backward(to + at, into + image * channels, by + at, from + at,
                          g + image * channels, pixels, channels);
    });
  });
}

// Checks the first channels of a channels-last map, and one with these channels alone; returns how
// far apart the rows of the former lie.
template <class Stored>
int64_t row_stride(const at::Tensor& part, const char* name, const at::Tensor& whole) {
  TORCH_CHECK_VALUE(part.dim() == 4 && part.scalar_type() == conv::kDtype<Stored> &&
                        part.sizes() == whole.sizes(),
                    name, " must be ", conv::kName<Stored>, " of shape ", whole.sizes(), ", got ",
                    part.scalar_type(), " of shape ", part.sizes());
  const int64_t pixels = part.size(2) * part.size(3);
  const int64_t stride = part.size(3) > 1   ? part.stride(3)
                         : part.size(2) > 1 ? part.stride(2)
                                            : part.stride(0);
  const bool rows = part.stride(1) == 1 && stride >= part.size(1) &&
                    (part.size(2) == 1 || part.stride(2) == stride * part.size(3)) &&
                    (part.size(0) == 1 || part.stride(0) == stride * pixels);
  TORCH_CHECK_VALUE(part.numel() == 0 || rows, name,
                    " must be the first channels of a channels-last map, got strides ",
                    part.strides());
  return stride;
}

void check_channels(const at::Tensor& t, const char* name, int64_t channels) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == channels,
                    name, " must be contiguous float32 of shape [", channels, "], got ", t.sizes());
}

void strided_affine_(at::Tensor out, const at::Tensor& x, const at::Tensor& scale,
                     const at::Tensor& shift, bool relu) {
  for_dtype(out, [&]<class Stored>(Stored) {
    const int64_t stride = row_stride<Stored>(x, "x", out), channels = out.size(1);
    conv::check_dense<Stored>(out, "out", x.sizes());
    check_channels(scale, "scale", channels);
    check_channels(shift, "shift", channels);
    if (out.numel() == 0) return;
    Stored* to = bits<Stored>(out);
    const Stored* from = bits<Stored>(x);
    at::parallel_for(
        0, out.numel() / channels, row_grain(channels), [&](int64_t begin, int64_t end) {
          rows::strided_affine(to + begin * channels, from + begin * stride, stride,
                               scale.const_data_ptr<float>(), shift.const_data_ptr<float>(), relu,
                               end - begin, channels);
        });
  });
}

void strided_scale_(at::Tensor total, const at::Tensor& gradient, const at::Tensor& scale,
                    bool add) {
  for_dtype(gradient, [&]<class Stored>(Stored) {
    const int64_t stride = row_stride<Stored>(total, "total", gradient);
    const int64_t channels = gradient.size(1);
    conv::check_dense<Stored>(gradient, "gradient", total.sizes());
    check_channels(scale, "scale", channels);
    if (total.numel() == 0) return;
    Stored* to = bits<Stored>(total);
    const Stored* from = bits<Stored>(gradient);
    at::parallel_for(
        0, total.numel() / channels, row_grain(channels), [&](int64_t begin, int64_t end) {
          rows::strided_scale(to + begin * stride, stride, from + begin * channels,
                              scale.const_data_ptr<float>(), add, end - begin, channels);
        });
  });
}

// The number of tokens of contiguous scores [..., N].
int64_t tokens_of(const at::Tensor& scores) {
  check_processor();
  TORCH_CHECK_VALUE(scores.scalar_type() == at::kBFloat16 && scores.dim() == 3 &&
                        scores.is_contiguous() && scores.size(2) <= rows::kMostTokens,
                    "scores must be contiguous bfloat16 [heads, M, N] with N at most ",
                    rows::kMostTokens, ", got ", scores.scalar_type(), " of shape ",
                    scores.sizes());
  return scores.size(2);
}

void attention_weights_(at::Tensor scores, const OptionalTensor& mask, double scale) {
  const int64_t n = tokens_of(scores);
  if (scores.numel() == 0) return;
  if (mask) {
    TORCH_CHECK_VALUE(mask->scalar_type() == at::kBFloat16 && mask->is_contiguous() &&
                          mask->dim() == 3 && mask->size(1) == scores.size(1) &&
                          mask->size(2) == n && mask->size(0) > 0 &&
                          scores.size(0) % mask->size(0) == 0,
                      "mask must be contiguous bfloat16 [heads or a divisor, M, N], got ",
                      mask->scalar_type(), " of shape ", mask->sizes());
  }
  const uint16_t* more = conv::stored<uint16_t>(mask);
  const int64_t mask_rows = mask ? mask->size(0) * mask->size(1) : 1;
  at::parallel_for(0, scores.numel() / n, row_grain(n),
                   [&, to = bits(scores)](int64_t begin, int64_t end) {
                     rows::attention_weights(to + begin * n, more, mask_rows, float(scale), begin,
                                             end - begin, n);
                   });
}

void attention_weights_backward_(at::Tensor gradient, const at::Tensor& weights, double scale) {
  const int64_t n = tokens_of(gradient);
  check_like(weights, "weights", gradient);
  if (gradient.numel() == 0) return;
  at::parallel_for(0, gradient.numel() / n, row_grain(n),
                   [&, to = bits(gradient), from = bits(weights)](int64_t begin, int64_t end) {
                     rows::attention_weights_backward(to + begin * n, from + begin * n,
                                                      float(scale), end - begin, n);
                   });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("activation_", &activation_);
  m.impl("activation_backward_", &activation_backward_);
  m.impl("rows_norm_", &rows_norm_);
  m.impl("rows_norm_backward_", &rows_norm_backward_);
  m.impl("channel_gate_", &channel_gate_);
  m.impl("channel_gate_backward_", &channel_gate_backward_);
  m.impl("strided_affine_", &strided_affine_);
  m.impl("strided_scale_", &strided_scale_);
  m.impl("attention_weights_", &attention_weights_);
  m.impl("attention_weights_backward_", &attention_weights_backward_);
}

}  // namespace fastadv
