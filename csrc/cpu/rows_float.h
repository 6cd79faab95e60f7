// Passes over rows of channels in float32, for any processor: the inner loops, without torch. As
// csrc/cpu/rows.h, where each is explained.
#pragma once

#include "cpu/rows.h"

namespace fastadv::rows {

void activate(float* out, const float* x, int64_t count, Activation kind);

void activate_backward(float* out, const float* gradient, const float* x, int64_t count,
                       Activation kind);

void layer_norm(float* out, float* statistics, const float* x, const Norm& norm, int64_t count);

void layer_norm_backward(float* out, const float* gradient, const float* x, const float* statistics,
                         const float* add, const Norm& norm, int64_t count);

void gate(float* out, const float* x, const float* gate, int64_t pixels, int64_t channels);

void gate_backward(float* out, float* sums, const float* gradient, const float* x,
                   const float* gate, int64_t pixels, int64_t channels);

void strided_affine(float* out, const float* x, int64_t stride, const float* scale,
                    const float* shift, bool relu, int64_t count, int64_t channels);

void strided_scale(float* total, int64_t stride, const float* gradient, const float* scale,
                   bool add, int64_t count, int64_t channels);

}  // namespace fastadv::rows
