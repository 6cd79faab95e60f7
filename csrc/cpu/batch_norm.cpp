// BatchNorm in training mode of channels-last images in bfloat16. Schemas:
// fastadv/engine/cpu_training.py.
//
// torch's BatchNorm converts every number to float32 in memory. Here the forward and the backward
// pass each read the images twice and write only the result. Sums are taken over blocks of rows in
// float32 and over the blocks in double, so that they do not depend on the number of threads.
#include <cmath>
#include <vector>

#include "cpu/conv_tensor.h"

namespace fastadv {
namespace {

constexpr int64_t kRowsAtOnce = 4;

// Memory of a channels-last tensor is rows of C values.
struct Rows {
  explicit Rows(const at::Tensor& x)
      : channels(x.size(1)),
        count(x.numel() / channels),
        block(std::max<int64_t>(kRowsAtOnce, kGrain / channels)),
        blocks((count + block - 1) / block) {}

  int64_t channels, count, block, blocks;
};

// Sums of x - shift and of its square.
FASTADV_INLINE void sum_values(float* sums, float* squares, const BFloat16* x, const float* shift,
                               int64_t rows, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) sums[c] = squares[c] = 0;
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
    const BFloat16* p = x + row * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const float s = shift[c], a = load(p[c]) - s, b = load(p[channels + c]) - s;
      const float d = load(p[2 * channels + c]) - s, e = load(p[3 * channels + c]) - s;
      sums[c] += (a + b) + (d + e);
      squares[c] += (a * a + b * b) + (d * d + e * e);
    }
  }
  for (; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c) {
      const float a = load(x[row * channels + c]) - shift[c];
      sums[c] += a;
      squares[c] += a * a;
    }
  }
}

// Sums of the gradient and of its product with x - mean.
FASTADV_INLINE void sum_gradients(float* sums, float* products, const BFloat16* gradient,
                                  const BFloat16* x, const float* mean, int64_t rows,
                                  int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) sums[c] = products[c] = 0;
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
    const BFloat16 *g = gradient + row * channels, *p = x + row * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const float m = mean[c], a = load(g[c]), b = load(g[channels + c]);
      const float d = load(g[2 * channels + c]), e = load(g[3 * channels + c]);
      sums[c] += (a + b) + (d + e);
      products[c] += (a * (load(p[c]) - m) + b * (load(p[channels + c]) - m)) +
                     (d * (load(p[2 * channels + c]) - m) + e * (load(p[3 * channels + c]) - m));
    }
  }
  for (; row < rows; ++row) {
    for (int64_t c = 0; c < channels; ++c) {
      const float a = load(gradient[row * channels + c]);
      sums[c] += a;
      products[c] += a * (load(x[row * channels + c]) - mean[c]);
    }
  }
}

FASTADV_INLINE void normalise_rows(BFloat16* out, const BFloat16* x, const float* scale,
                                   const float* shift, int64_t rows, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * channels;
    for (int64_t c = 0; c < channels; ++c) {
      store(out[at + c], load(x[at + c]) * scale[c] + shift[c]);
    }
  }
}

FASTADV_INLINE void differentiate_rows(BFloat16* out, const BFloat16* gradient, const BFloat16* x,
                                       const float* scale, const float* slope, const float* shift,
                                       int64_t rows, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * channels;
    for (int64_t c = 0; c < channels; ++c) {
      store(out[at + c],
            load(gradient[at + c]) * scale[c] + (load(x[at + c]) * slope[c] + shift[c]));
    }
  }
}

// Two sums over all rows, [2][C]; f(sums, others, first row, rows) computes those of one block.
template <class F>
std::vector<double> all_sums(const Rows& rows, const F& f) {
  const int64_t channels = rows.channels;
  std::vector<float> parts(size_t(rows.blocks * 2 * channels));
  at::parallel_for(0, rows.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* part = parts.data() + i * 2 * channels;
      f(part, part + channels, i * rows.block, std::min(rows.block, rows.count - i * rows.block));
    }
  });
  std::vector<double> sums(size_t(2 * channels));
  for (int64_t i = 0; i < rows.blocks; ++i) {
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += parts[i * 2 * channels + c];
  }
  return sums;
}

// Runs f(first element, rows) over all rows, in parallel.
template <class F>
void for_rows(const Rows& rows, const F& f) {
  at::parallel_for(0, rows.count, rows.block,
                   [&](int64_t begin, int64_t end) { f(begin * rows.channels, end - begin); });
}

const BFloat16* values(const at::Tensor& t) {
  return static_cast<const BFloat16*>(t.const_data_ptr());
}

const float* checked(const OptionalTensor& t, const char* name, int64_t channels) {
  TORCH_CHECK_VALUE(!t || (t->scalar_type() == at::kFloat && t->is_contiguous() && t->dim() == 1 &&
                           t->numel() == channels),
                    name, " must be contiguous float32 of shape [", channels, "]");
  return t ? t->const_data_ptr<float>() : nullptr;
}

void check_pair(const at::Tensor& t, const char* name, int64_t channels) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() &&
                        t.sizes() == at::IntArrayRef({2, channels}),
                    name, " must be contiguous float32 of shape [2, ", channels, "], got ",
                    t.sizes());
}

void check_images(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0,
                    "x must be [B, C, H, W] with at least one element, got ", x.sizes());
  conv::check_dense(x, "x", x.sizes());
}

void batch_norm_train_(at::Tensor out, at::Tensor statistics, const at::Tensor& x,
                       const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& running_mean, const OptionalTensor& running_var,
                       double momentum, double eps) {
  check_images(x);
  conv::check_dense(out, "out", x.sizes());
  const Rows rows(x);
  const int64_t channels = rows.channels;
  check_pair(statistics, "statistics", channels);
  const float *w = checked(weight, "weight", channels), *b = checked(bias, "bias", channels);
  checked(running_mean, "running_mean", channels);
  checked(running_var, "running_var", channels);
  // Sums of differences from the first row, so that no square is of the mean.
  std::vector<float> shift(channels);
  for (int64_t c = 0; c < channels; ++c) shift[c] = load(values(x)[c]);
  const std::vector<double> sums =
      all_sums(rows, [&](float* s, float* squares, int64_t first, int64_t count) {
        FASTADV_DISPATCH(
            sum_values(s, squares, values(x) + first * channels, shift.data(), count, channels));
      });
  float *mean = statistics.data_ptr<float>(), *inverse = mean + channels;
  float* moving_mean = running_mean ? running_mean->data_ptr<float>() : nullptr;
  float* moving_var = running_var ? running_var->data_ptr<float>() : nullptr;
  std::vector<float> scale(channels), offset(channels);
  const double n = double(rows.count);
  for (int64_t c = 0; c < channels; ++c) {
    const double apart = sums[c] / n;
    // Not std::max, which would turn a variance of NaN into 0.
    double variance = sums[channels + c] / n - apart * apart;
    if (variance < 0) variance = 0;
    mean[c] = float(shift[c] + apart);
    inverse[c] = float(1 / std::sqrt(variance + eps));
    scale[c] = inverse[c] * (w ? w[c] : 1);
    offset[c] = (b ? b[c] : 0) - mean[c] * scale[c];
    if (moving_mean) {
      moving_mean[c] = float(momentum * mean[c] + (1 - momentum) * moving_mean[c]);
    }
    if (moving_var) {
      const double unbiased = variance * n / (n - 1);
      moving_var[c] = float(momentum * unbiased + (1 - momentum) * moving_var[c]);
    }
  }
  for_rows(rows, [&](int64_t at, int64_t count) {
    FASTADV_DISPATCH(normalise_rows(data<BFloat16>(out) + at, values(x) + at, scale.data(),
                                    offset.data(), count, channels));
  });
}

void batch_norm_train_backward_(at::Tensor out, at::Tensor at_parameters,
                                const at::Tensor& gradient, const at::Tensor& x,
                                const at::Tensor& statistics, const OptionalTensor& weight) {
  check_images(x);
  conv::check_dense(out, "out", x.sizes());
  conv::check_dense(gradient, "gradient", x.sizes());
  const Rows rows(x);
  const int64_t channels = rows.channels;
  check_pair(statistics, "statistics", channels);
  check_pair(at_parameters, "at_parameters", channels);
  const float* w = checked(weight, "weight", channels);
  const float *mean = statistics.const_data_ptr<float>(), *inverse = mean + channels;
  const std::vector<double> sums =
      all_sums(rows, [&](float* s, float* products, int64_t first, int64_t count) {
        const int64_t at = first * channels;
        FASTADV_DISPATCH(sum_gradients(s, products, values(gradient) + at, values(x) + at, mean,
                                       count, channels));
      });
  float *at_weight = at_parameters.data_ptr<float>(), *at_bias = at_weight + channels;
  std::vector<float> scale(channels), slope(channels), offset(channels);
  const double n = double(rows.count);
  for (int64_t c = 0; c < channels; ++c) {
    const double gain = double(inverse[c]) * (w ? w[c] : 1);
    const double bend = sums[channels + c] * inverse[c] * inverse[c] / n * gain;
    at_weight[c] = float(sums[channels + c] * inverse[c]);
    at_bias[c] = float(sums[c]);
    scale[c] = float(gain);
    slope[c] = float(-bend);
    offset[c] = float(bend * mean[c] - sums[c] / n * gain);
  }
  for_rows(rows, [&](int64_t at, int64_t count) {
    FASTADV_DISPATCH(differentiate_rows(data<BFloat16>(out) + at, values(gradient) + at,
                                        values(x) + at, scale.data(), slope.data(), offset.data(),
                                        count, channels));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("batch_norm_train_", &batch_norm_train_);
  m.impl("batch_norm_train_backward_", &batch_norm_train_backward_);
}

}  // namespace fastadv
