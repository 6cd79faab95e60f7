// Passes over rows of channels in bfloat16 for processors with AVX512-BF16: activations, LayerNorm
// and gates per channel, each with its gradient. The inner loops, without torch.
#pragma once

#include <cstdint>

namespace fastadv::rows {

enum class Activation : int64_t {
  kGelu,
  kGeluTanh,
  kSilu,
  kHardswish,
  kHardsigmoid,
  kSigmoid,
  kRelu6,
  kCount
};

// out = f(x).
void activate(uint16_t* out, const uint16_t* x, int64_t count, Activation kind);

// out = gradient * f'(x).
void activate_backward(uint16_t* out, const uint16_t* gradient, const uint16_t* x, int64_t count,
                       Activation kind);

struct Norm {
  int64_t channels;
  const float *weight, *bias;  // [channels]; null = 1 and 0
  float eps;
};

// Normalises `count` rows, and keeps the mean and 1 / deviation of each in `statistics` [count, 2].
void layer_norm(uint16_t* out, float* statistics, const uint16_t* x, const Norm& norm,
                int64_t count);

// Its gradient in x. `add`, if not null, is added.
void layer_norm_backward(uint16_t* out, const uint16_t* gradient, const uint16_t* x,
                         const float* statistics, const uint16_t* add, const Norm& norm,
                         int64_t count);

// out = x * gate, for one image of `pixels` rows; `gate` [channels].
void gate(uint16_t* out, const uint16_t* x, const uint16_t* gate, int64_t pixels, int64_t channels);

// out = gradient * gate, and sums[c] = the sum over pixels of gradient * x.
void gate_backward(uint16_t* out, float* sums, const uint16_t* gradient, const uint16_t* x,
                   const uint16_t* gate, int64_t pixels, int64_t channels);

// out = x * scale + shift, and then max(0, .) if `relu`, for `count` rows of `channels`. Rows of x
// lie `stride` elements apart, those of out side by side.
void strided_affine(uint16_t* out, const uint16_t* x, int64_t stride, const float* scale,
                    const float* shift, bool relu, int64_t count, int64_t channels);

// total = gradient * scale, plus what it was before if `add`. Rows of total lie `stride` elements
// apart.
void strided_scale(uint16_t* total, int64_t stride, const uint16_t* gradient, const float* scale,
                   bool add, int64_t count, int64_t channels);

constexpr int64_t kMostTokens = 1024;  // of a row of attention weights

// scores = softmax(scores * scale + mask) for `count` rows of n; row r of the mask, if not null, is
// r modulo `mask_rows`.
void attention_weights(uint16_t* scores, const uint16_t* mask, int64_t mask_rows, float scale,
                       int64_t first_row, int64_t count, int64_t n);

// gradient = the gradient in the scores, given the one in the weights.
void attention_weights_backward(uint16_t* gradient, const uint16_t* weights, float scale,
                                int64_t count, int64_t n);

}  // namespace fastadv::rows
