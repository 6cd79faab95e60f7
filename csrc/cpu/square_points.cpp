// The points that Square tries in linf: images with one more square each. Schema and meaning:
// fastadv/attacks/square_points.py.
#include <ATen/ops/empty_strided.h>

#include "cpu/active.h"
#include "cpu/tensor.h"

namespace fastadv {
namespace {

constexpr int kWordBits = 32;

// Where an image's square begins along an axis, from 32 random bits; no others are read, so that
// the square lies in the image whatever the word.
int64_t start_of(int64_t word, int64_t side, int64_t length) {
  return int64_t(uint32_t(word)) * (length - side + 1) >> kWordBits;
}

at::Tensor square_points(const at::Tensor& images, const at::Tensor& highest,
                         const at::Tensor& lowest, const at::Tensor& words, int64_t side) {
  TORCH_CHECK_VALUE(images.dim() == 4 && is_batch_major(images),
                    "images must be a dense run of samples [B, C, H, W], got shape ",
                    images.sizes(), " with strides ", images.strides());
  TORCH_CHECK_TYPE(images.scalar_type() == at::kFloat || images.scalar_type() == at::kDouble,
                   "images must be float32 or float64, got ", images.scalar_type());
  for (const at::Tensor& t : {highest, lowest}) {
    check_shape(t, "highest and lowest", images, "images");
    check_dtype(t, "highest and lowest", images, "images");
    TORCH_CHECK_VALUE(same_layout(t, images), "highest and lowest must have the layout of images");
  }
  const int64_t batch = images.size(0), channels = images.size(1), height = images.size(2),
                width = images.size(3), size = sample_size(images);
  TORCH_CHECK_VALUE(side >= 1 && side <= std::min(height, width), "side must be from 1 to ",
                    std::min(height, width), ", got ", side);
  const int64_t needed = 2 + (channels + kWordBits - 1) / kWordBits;
  TORCH_CHECK_VALUE(words.scalar_type() == at::kLong && words.dim() == 2 &&
                        words.size(0) == batch && words.size(1) == needed,
                    "words must be int64 [", batch, ", ", needed, "], got ", words.scalar_type(),
                    " ", words.sizes());
  check_device(words, "words", images);
  const at::Tensor drawn = words.contiguous();
  at::Tensor points = at::empty_strided(images.sizes(), images.strides(), images.options());
  if (size == 0) return points;
  const int64_t by_channel = images.stride(1), by_row = images.stride(2),
                by_column = images.stride(3);
  const auto run = [&](auto t) {
    using T = decltype(t);
    const T *from = data<T>(images), *high = data<T>(highest), *low = data<T>(lowest);
    T* to = data<T>(points);
    const int64_t* bits = drawn.const_data_ptr<int64_t>();
    const int64_t grain = std::max<int64_t>(1, 4 * kGrain / size);
    at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        const int64_t at = image * size;
        const int64_t* own = bits + image * needed;
        copy_elements(to + at, from + at, size);
        const int64_t top = start_of(own[0], side, height), left = start_of(own[1], side, width);
        for (int64_t c = 0; c < channels; ++c) {
          const bool up = own[2 + c / kWordBits] >> (c % kWordBits) & 1;
          const T* bound = up ? high : low;
          for (int64_t h = top; h < top + side; ++h) {
            for (int64_t w = left; w < left + side; ++w) {
              const int64_t place = at + c * by_channel + h * by_row + w * by_column;
              to[place] = bound[place];
            }
          }
        }
      }
    });
  };
  if (images.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    run(double{});
  }
  return points;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("square_points", &square_points); }

}  // namespace fastadv
