// Passes over images channel by channel, which the attack engine's programs need besides
// convolutions. Schemas: fastadv/engine/cpu_convolution.py.
#include "cpu/scratch.h"
#include "cpu/tensor.h"

namespace fastadv {
namespace {

// Runs of channels: memory of a channels-last tensor is rows of C values.
template <class T, bool has_add, bool has_mask, bool relu>
FASTADV_INLINE void affine_rows(T* out, const T* x, const float* scale, const float* shift,
                                const T* add, const T* mask, int64_t rows, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * channels;
    for (int64_t c = 0; c < channels; ++c) {
      float v = load(x[at + c]) * scale[c] + shift[c];
      if (relu) v = v < 0 ? 0 : v;  // NaN stays
      if (has_mask) v = load(mask[at + c]) > 0 ? v : 0;
      if (has_add) v += load(add[at + c]);
      store(out[at + c], v);
    }
  }
}

template <class T, bool has_add, bool has_mask>
FASTADV_INLINE void merge_run(T* out, const T* x, const T* add, const T* mask, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float v = load(x[i]);
    if (has_add) v += load(add[i]);
    if (has_mask) v = load(mask[i]) > 0 ? v : 0;
    store(out[i], v);
  }
}

// The means over the pixels of one image, [C].
template <class T>
FASTADV_INLINE void mean_rows(float* means, const T* x, int64_t pixels, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) means[c] = 0;
  for (int64_t row = 0; row < pixels; ++row) {
    for (int64_t c = 0; c < channels; ++c) means[c] += load(x[row * channels + c]);
  }
  for (int64_t c = 0; c < channels; ++c) means[c] /= float(pixels);
}

// Gives every pixel of one image its part of the gradient in the means, `share` [C].
template <class T, bool has_add, bool has_mask>
FASTADV_INLINE void spread_rows(T* out, const float* share, const T* add, const T* mask,
                                int64_t pixels, int64_t channels) {
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

void check_dtype(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kFloat, name,
                    " must be bfloat16 or float32, got ", t.scalar_type());
}

void check_images(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast), name,
                    " must be channels-last [B, C, H, W], got ", t.sizes());
  check_dtype(t, name);
}

const char* name_of(at::ScalarType dtype) { return dtype == at::kFloat ? "float32" : "bfloat16"; }

void check_like(const at::Tensor& t, const char* name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.scalar_type() == like.scalar_type() && t.sizes() == like.sizes() &&
                        is_batch_major(t) && same_layout(t, like),
                    name, " must be ", name_of(like.scalar_type()),
                    " with the shape and layout of x, ", like.sizes(), ", got ", t.scalar_type(),
                    " of shape ", t.sizes());
}

template <class T>
const T* pointer(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Calls f with a value of the storage type of images that have been checked.
template <class F>
void for_dtype(const at::Tensor& images, const F& f) {
  if (images.scalar_type() == at::kFloat) {
    f(float{});
  } else {
    f(BFloat16{});
  }
}

void channel_affine_(at::Tensor out, const at::Tensor& x, const at::Tensor& scale,
                     const at::Tensor& shift, const OptionalTensor& add, const OptionalTensor& mask,
                     bool relu) {
  check_images(x, "x");
  check_like(out, "out", x);
  if (add) check_like(*add, "add", x);
  if (mask) check_like(*mask, "mask", x);
  const int64_t channels = x.size(1);
  for (const at::Tensor* t : {&scale, &shift}) {
    TORCH_CHECK_VALUE(
        t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == channels,
        "scale and shift must be float32 of shape [", channels, "], got ", t->sizes());
  }
  TORCH_CHECK_VALUE(!(relu && (add || mask)), "relu cannot be combined with add or mask");
  const int64_t rows = channels ? x.numel() / channels : 0;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, channels));
  for_dtype(x, [&]<class T>(T) {
    const auto run = add    ? (mask ? dispatched<affine_rows<T, true, true, false>>
                                    : dispatched<affine_rows<T, true, false, false>>)
                     : mask ? dispatched<affine_rows<T, false, true, false>>
                     : relu ? dispatched<affine_rows<T, false, false, true>>
                            : dispatched<affine_rows<T, false, false, false>>;
    T* to = data<T>(out);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const T *a = pointer<T>(add), *m = pointer<T>(mask);
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * channels;
      run(to + at, from + at, scale.const_data_ptr<float>(), shift.const_data_ptr<float>(),
          a ? a + at : nullptr, m ? m + at : nullptr, end - begin, channels);
    });
  });
}

void merge_gradients_(at::Tensor out, const at::Tensor& x, const OptionalTensor& add,
                      const OptionalTensor& mask) {
  check_dtype(x, "x");  // of any shape, without gaps
  check_like(x, "x", x);
  check_like(out, "out", x);
  if (add) check_like(*add, "add", x);
  if (mask) check_like(*mask, "mask", x);
  for_dtype(x, [&]<class T>(T) {
    const auto run =
        add ? (mask ? dispatched<merge_run<T, true, true>> : dispatched<merge_run<T, true, false>>)
            : (mask ? dispatched<merge_run<T, false, true>>
                    : dispatched<merge_run<T, false, false>>);
    T* to = data<T>(out);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const T *a = pointer<T>(add), *m = pointer<T>(mask);
    at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      run(to + begin, from + begin, a ? a + begin : nullptr, m ? m + begin : nullptr, end - begin);
    });
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
  check_images(x, "x");
  check_means(out, "out", x);
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  float* means = out.data_ptr<float>();
  for_dtype(x, [&]<class T>(T) {
    const T* from = static_cast<const T*>(x.const_data_ptr());
    for_images(x, [&](int64_t image, int64_t at) {
      FASTADV_DISPATCH(mean_rows(means + image * channels, from + at, pixels, channels));
    });
  });
}

void spread_pixel_means_(at::Tensor out, const at::Tensor& gradient, const OptionalTensor& add,
                         const OptionalTensor& mask) {
  check_images(out, "out");
  check_means(gradient, "gradient", out);
  if (add) check_like(*add, "add", out);
  if (mask) check_like(*mask, "mask", out);
  const int64_t channels = out.size(1), pixels = out.size(2) * out.size(3);
  const float* from = gradient.const_data_ptr<float>();
  for_dtype(out, [&]<class T>(T) {
    const auto run = add ? (mask ? dispatched<spread_rows<T, true, true>>
                                 : dispatched<spread_rows<T, true, false>>)
                         : (mask ? dispatched<spread_rows<T, false, true>>
                                 : dispatched<spread_rows<T, false, false>>);
    T* to = data<T>(out);
    const T *a = pointer<T>(add), *m = pointer<T>(mask);
    for_images(out, [&](int64_t image, int64_t at) {
      auto* share = static_cast<float*>(thread_scratch(channels * int64_t(sizeof(float))));
      for (int64_t c = 0; c < channels; ++c) share[c] = from[image * channels + c] / float(pixels);
      run(to + at, share, a ? a + at : nullptr, m ? m + at : nullptr, pixels, channels);
    });
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
