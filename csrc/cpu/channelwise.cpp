// What the attack engine's programs need besides convolutions: passes over images channel by
// channel. Schemas: fastadv/engine/cpu_convolution.py.
#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace fastadv {
namespace {

// Runs of channels: memory of a channels-last tensor is rows of C values.
template <bool has_add, bool has_mask, bool relu>
FASTADV_INLINE void affine_rows(BFloat16* out, const BFloat16* x, const float* scale,
                                const float* shift, const BFloat16* add, const BFloat16* mask,
                                int64_t rows, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * channels;
    for (int64_t c = 0; c < channels; ++c) {
      float v = load(x[at + c]) * scale[c] + shift[c];
      if (relu) v = v > 0 ? v : 0;
      if (has_mask) v = load(mask[at + c]) > 0 ? v : 0;
      if (has_add) v += load(add[at + c]);
      store(out[at + c], v);
    }
  }
}

template <bool has_add, bool has_mask>
FASTADV_INLINE void merge_run(BFloat16* out, const BFloat16* x, const BFloat16* add,
                              const BFloat16* mask, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float v = load(x[i]);
    if (has_add) v += load(add[i]);
    if (has_mask) v = load(mask[i]) > 0 ? v : 0;
    store(out[i], v);
  }
}

// The means over the pixels of one image, [C].
FASTADV_INLINE void mean_rows(float* means, const BFloat16* x, int64_t pixels, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) means[c] = 0;
  for (int64_t row = 0; row < pixels; ++row) {
    for (int64_t c = 0; c < channels; ++c) means[c] += load(x[row * channels + c]);
  }
  for (int64_t c = 0; c < channels; ++c) means[c] /= float(pixels);
}

// Gives every pixel of one image its part of the gradient in the means, `share` [C].
template <bool has_add, bool has_mask>
FASTADV_INLINE void spread_rows(BFloat16* out, const float* share, const BFloat16* add,
                                const BFloat16* mask, int64_t pixels, int64_t channels) {
  for (int64_t row = 0; row < pixels; ++row) {
    const int64_t at = row * channels;
    for (int64_t c = 0; c < channels; ++c) {
      float v = share[c];
      if (has_add) v += load(add[at + c]);
      if (has_mask) v = load(mask[at + c]) > 0 ? v : 0;
      store(out[at + c], v);
    }
  }
}

void check_like(const at::Tensor& t, const char* name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kBFloat16 && t.sizes() == like.sizes() &&
                        is_batch_major(t) && same_layout(t, like),
                    name, " must be bfloat16 with the shape and layout of x, ", like.sizes(),
                    ", got ", t.scalar_type(), " of shape ", t.sizes());
}

const BFloat16* pointer(const OptionalTensor& t) {
  return t ? static_cast<const BFloat16*>(t->const_data_ptr()) : nullptr;
}

void channel_affine_(at::Tensor out, const at::Tensor& x, const at::Tensor& scale,
                     const at::Tensor& shift, const OptionalTensor& add, const OptionalTensor& mask,
                     bool relu) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast),
                    "x must be channels-last [B, C, H, W], got ", x.sizes());
  check_like(x, "x", x);
  check_like(out, "out", x);
  if (add) check_like(*add, "add", x);
  if (mask) check_like(*mask, "mask", x);
  const int64_t channels = x.size(1);
  for (const at::Tensor* t : {&scale, &shift}) {
    TORCH_CHECK_VALUE(
        t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == channels,
        "scale and shift must be float32 of shape [", channels, "], got ", t->sizes());
  }
  const auto run = add    ? (mask ? dispatched<affine_rows<true, true, false>>
                                  : dispatched<affine_rows<true, false, false>>)
                   : mask ? dispatched<affine_rows<false, true, false>>
                   : relu ? dispatched<affine_rows<false, false, true>>
                          : dispatched<affine_rows<false, false, false>>;
  TORCH_CHECK_VALUE(!(relu && (add || mask)), "relu cannot be combined with add or mask");
  auto* to = static_cast<BFloat16*>(out.data_ptr());
  const auto* from = static_cast<const BFloat16*>(x.const_data_ptr());
  const BFloat16 *a = pointer(add), *m = pointer(mask);
  const int64_t rows = channels ? x.numel() / channels : 0;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, channels));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * channels;
    run(to + at, from + at, scale.const_data_ptr<float>(), shift.const_data_ptr<float>(),
        a ? a + at : nullptr, m ? m + at : nullptr, end - begin, channels);
  });
}

void merge_gradients_(at::Tensor out, const at::Tensor& x, const OptionalTensor& add,
                      const OptionalTensor& mask) {
  check_like(x, "x", x);
  check_like(out, "out", x);
  if (add) check_like(*add, "add", x);
  if (mask) check_like(*mask, "mask", x);
  const auto run =
      add ? (mask ? dispatched<merge_run<true, true>> : dispatched<merge_run<true, false>>)
          : (mask ? dispatched<merge_run<false, true>> : dispatched<merge_run<false, false>>);
  auto* to = static_cast<BFloat16*>(out.data_ptr());
  const auto* from = static_cast<const BFloat16*>(x.const_data_ptr());
  const BFloat16 *a = pointer(add), *m = pointer(mask);
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    run(to + begin, from + begin, a ? a + begin : nullptr, m ? m + begin : nullptr, end - begin);
  });
}

void check_means(const at::Tensor& t, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() &&
                        t.sizes() == at::IntArrayRef({x.size(0), x.size(1)}),
                    name, " must be contiguous float32 of shape [", x.size(0), ", ", x.size(1),
                    "], got ", t.scalar_type(), " of shape ", t.sizes());
}

// Calls f(image, first element) for all images, in parallel.
template <class F>
void for_images(const at::Tensor& x, const F& f) {
  const int64_t size = x.size(0) ? x.numel() / x.size(0) : 0;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
  at::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) f(image, image * size);
  });
}

void pixel_means_(at::Tensor out, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast),
                    "x must be channels-last [B, C, H, W], got ", x.sizes());
  check_like(x, "x", x);
  check_means(out, "out", x);
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  float* means = out.data_ptr<float>();
  const auto* from = static_cast<const BFloat16*>(x.const_data_ptr());
  for_images(x, [&](int64_t image, int64_t at) {
    FASTADV_DISPATCH(mean_rows(means + image * channels, from + at, pixels, channels));
  });
}

void spread_pixel_means_(at::Tensor out, const at::Tensor& gradient, const OptionalTensor& add,
                         const OptionalTensor& mask) {
  TORCH_CHECK_VALUE(out.dim() == 4 && out.is_contiguous(at::MemoryFormat::ChannelsLast),
                    "out must be channels-last [B, C, H, W], got ", out.sizes());
  check_like(out, "out", out);
  check_means(gradient, "gradient", out);
  if (add) check_like(*add, "add", out);
  if (mask) check_like(*mask, "mask", out);
  const auto run =
      add ? (mask ? dispatched<spread_rows<true, true>> : dispatched<spread_rows<true, false>>)
          : (mask ? dispatched<spread_rows<false, true>> : dispatched<spread_rows<false, false>>);
  const int64_t channels = out.size(1), pixels = out.size(2) * out.size(3);
  auto* to = static_cast<BFloat16*>(out.data_ptr());
  const float* from = gradient.const_data_ptr<float>();
  const BFloat16 *a = pointer(add), *m = pointer(mask);
  for_images(out, [&](int64_t image, int64_t at) {
    auto* share = static_cast<float*>(thread_scratch(channels * int64_t(sizeof(float))));
    for (int64_t c = 0; c < channels; ++c) share[c] = from[image * channels + c] / float(pixels);
    run(to + at, share, a ? a + at : nullptr, m ? m + at : nullptr, pixels, channels);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("channel_affine_", &channel_affine_);
  m.impl("merge_gradients_", &merge_gradients_);
  m.impl("pixel_means_", &pixel_means_);
  m.impl("spread_pixel_means_", &spread_pixel_means_);
}

}  // namespace fastadv
