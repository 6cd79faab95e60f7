// Gather, crop, flip and scale uint8 images on the CPU. Definition: fastadv/ops/crop_flip.py.
#include <ATen/ops/empty.h>

#include "cpu/noise.h"

namespace fastadv {
namespace {

struct Window {
  int64_t down, right;
  bool mirrored;
};

Window draw_window(uint64_t seed, uint64_t sample, int64_t pad, bool flip) {
  uint32_t words[kWords * kBlocks];
  philox_blocks(words, 0, Key{seed, sample, 0});
  const int64_t places = 2 * pad + 1;
  return {int64_t(words[0] % places) - pad, int64_t(words[1] % places) - pad,
          flip && (words[2] & 1)};
}

// Source position of a padded position; -1 where a zero border is meant.
int64_t fold(int64_t position, int64_t size, bool reflect) {
  if (position >= 0 && position < size) return position;
  if (!reflect) return -1;
  return position < 0 ? -position : 2 * (size - 1) - position;
}

struct Geometry {
  int64_t channels, height, width;
  int64_t from_channel, from_row, from_column;  // strides of the source image
  int64_t to_channel, to_row, to_column;        // strides of the result
};

// count pixels, source and result each with a stride of its own. The division is IEEE, as in every
// other backend.
template <class T>
FASTADV_INLINE void scale_run(T* to, const uint8_t* from, int64_t count, int64_t to_stride,
                              int64_t from_stride) {
  for (int64_t i = 0; i < count; ++i) {
    store(to[i * to_stride], Compute<T>(float(from[i * from_stride]) / 255.0f));
  }
}

template <class T>
FASTADV_INLINE void scale_forward(T* to, const uint8_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(to[i], Compute<T>(float(from[i]) / 255.0f));
}

template <class T>
FASTADV_INLINE void scale_mirrored(T* to, const uint8_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(to[i], Compute<T>(float(from[-i]) / 255.0f));
}

// One row of one channel whose source row is known.
template <class T>
void crop_row(T* to, const uint8_t* row, const Window& window, const Geometry& g, bool reflect) {
  // Result columns [first, last) read inside the image, the rest from the border. A border wider
  // than the image can leave none.
  const int64_t offset = window.mirrored ? -window.right : window.right;
  const int64_t first = std::clamp<int64_t>(-offset, 0, g.width);
  const int64_t last = std::clamp<int64_t>(g.width - offset, first, g.width);
  const auto source = [&](int64_t j) {
    return (window.mirrored ? g.width - 1 - j : j) + window.right;
  };
  const auto border = [&](int64_t j) {
    const int64_t column = fold(source(j), g.width, reflect);
    const float value = column < 0 ? 0.0f : float(row[column * g.from_column]) / 255.0f;
    store(to[j * g.to_column], Compute<T>(value));
  };
  for (int64_t j = 0; j < first; ++j) border(j);
  for (int64_t j = last; j < g.width; ++j) border(j);
  if (first == last) return;
  const uint8_t* start = row + source(first) * g.from_column;
  T* inner = to + first * g.to_column;
  const int64_t count = last - first;
  if (g.to_column == 1 && g.from_column == 1) {
    window.mirrored ? FASTADV_DISPATCH(scale_mirrored(inner, start, count))
                    : FASTADV_DISPATCH(scale_forward(inner, start, count));
  } else {
    const int64_t from_stride = window.mirrored ? -g.from_column : g.from_column;
    FASTADV_DISPATCH(scale_run(inner, start, count, g.to_column, from_stride));
  }
}

template <class T>
void crop_image(T* to, const uint8_t* from, const Window& window, const Geometry& g, bool reflect) {
  for (int64_t i = 0; i < g.height; ++i) {
    const int64_t row = fold(i + window.down, g.height, reflect);
    for (int64_t c = 0; c < g.channels; ++c) {
      T* line = to + c * g.to_channel + i * g.to_row;
      if (row >= 0) {
        crop_row(line, from + c * g.from_channel + row * g.from_row, window, g, reflect);
      } else {
        for (int64_t j = 0; j < g.width; ++j) store(line[j * g.to_column], Compute<T>(0));
      }
    }
  }
}

void check_arguments(const at::Tensor& images, const at::Tensor& indices, int64_t pad,
                     c10::string_view mode, const at::Tensor& sample_ids) {
  TORCH_CHECK_TYPE(images.scalar_type() == at::kByte, "images must be uint8, got ",
                   images.scalar_type());
  TORCH_CHECK_VALUE(images.dim() == 4, "images must have axes [N, C, H, W], got ", images.sizes());
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong && indices.dim() == 1,
                   "indices must be int64 [B]");
  TORCH_CHECK_VALUE(sample_ids.scalar_type() == at::kLong && sample_ids.sizes() == indices.sizes(),
                    "sample_ids must be int64 of shape ", indices.sizes(), ", got ",
                    sample_ids.sizes());
  TORCH_CHECK_VALUE(mode == "constant" || mode == "reflect",
                    "mode must be one of constant, reflect, got ", mode);
  const int64_t smallest = std::min(images.size(2), images.size(3));
  TORCH_CHECK_VALUE(pad >= 0 && (mode == "constant" || pad < smallest),
                    "pad must be >= 0 and, for reflect, < ", smallest, ", got ", pad);
}

at::Tensor crop_flip(const at::Tensor& images, const at::Tensor& indices, int64_t pad,
                     c10::string_view mode, bool flip, int64_t seed, const at::Tensor& sample_ids,
                     at::ScalarType dtype, bool channels_last) {
  check_arguments(images, indices, pad, mode, sample_ids);
  const int64_t batch = indices.size(0), count = images.size(0);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  at::Tensor out = at::empty({batch, images.size(1), images.size(2), images.size(3)},
                             images.options().dtype(dtype).memory_format(format));
  if (out.numel() == 0) return out;
  const at::Tensor which = indices.contiguous(), ids = sample_ids.contiguous();
  const int64_t* w = which.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch; ++i) {
    TORCH_CHECK_INDEX(w[i] >= 0 && w[i] < count, "indices must be in 0 .. ", count - 1, ", got ",
                      w[i]);
  }
  const Geometry g{images.size(1),   images.size(2),   images.size(3),
                   images.stride(1), images.stride(2), images.stride(3),
                   out.stride(1),    out.stride(2),    out.stride(3)};
  const uint8_t* source = images.const_data_ptr<uint8_t>();
  const bool reflect = mode == "reflect", random = pad > 0 || flip;
  dispatch_float(dtype, "dtype", [&](auto t) {
    using T = decltype(t);
    const int64_t grain = std::max<int64_t>(1, kGrain / sample_size(out));
    at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t id = uint64_t(ids.const_data_ptr<int64_t>()[i]);
        const Window window =
            random ? draw_window(uint64_t(seed), id, pad, flip) : Window{0, 0, false};
        crop_image(data<T>(out) + i * out.stride(0), source + w[i] * images.stride(0), window, g,
                   reflect);
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("crop_flip", &crop_flip); }

}  // namespace fastadv
