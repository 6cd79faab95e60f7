// Host side of the Winograd convolution in float32. Schemas: fastadv/engine/cpu_convolution.py.
#include "cpu/conv3x3_float.h"

#include "cpu/conv_tensor.h"

namespace fastadv {
namespace {

using conv3x3::Filters;
using conv3x3::FloatKernel;
using conv3x3::Shape;

// The widest vectors, in floats, that this processor and this code have; 0: none.
int64_t conv3x3_float_lanes() {
  if (kSimdLevel == SimdLevel::kAvx512) return conv3x3::kFloatAvx512.lanes;
  return kSimdLevel == SimdLevel::kAvx2 ? conv3x3::kFloatAvx2.lanes : 0;
}

const FloatKernel& kernel_of(int64_t lanes, int64_t in_channels) {
  TORCH_CHECK_VALUE((lanes == 8 || lanes == 16) && lanes <= conv3x3_float_lanes(),
                    "lanes must be 8 or 16 and at most this processor's ", conv3x3_float_lanes(),
                    ", got ", lanes);
  TORCH_CHECK_VALUE(in_channels > 0 && in_channels % lanes == 0,
                    "input channels must be a multiple of lanes, ", lanes, ", got ", in_channels);
  return lanes == 16 ? conv3x3::kFloatAvx512 : conv3x3::kFloatAvx2;
}

void conv3x3_float_pack_(at::Tensor packed, const at::Tensor& weight, const OptionalTensor& scale,
                         bool backward, int64_t lanes) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                    "weight must have shape [K, C, 3, 3], got ", weight.sizes());
  const int64_t k = weight.size(0), c = weight.size(1);
  const int64_t in = backward ? k : c, out = backward ? c : k;
  const FloatKernel& kernel = kernel_of(lanes, in);
  conv::check_packed<float>(packed, conv3x3::kPoints * in * conv::padded(out));
  const at::Tensor w = weight.to(at::kFloat).contiguous();
  const at::Tensor s = conv::checked_scale(scale, k);
  const float* factors = s.defined() ? s.const_data_ptr<float>() : nullptr;
  const float* source = w.const_data_ptr<float>();
  const Filters filters = backward ? Filters{source, 9, 9 * c, 1, true, factors, true, in, out}
                                   : Filters{source, 9 * c, 9, 1, false, factors, false, in, out};
  float* to = packed.data_ptr<float>();
  at::parallel_for(0, conv::padded(out) / conv::kVector, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel.transform_filters(to, filters, i * conv::kVector);
  });
}

// As for bfloat16 in conv3x3.cpp. Measured best: 18 at 64 channels, 64 and more from 256 on.
int64_t tiles_per_task(const Shape& shape, int64_t threads) {
  return conv::even_share(shape.tiles(), std::clamp<int64_t>(shape.in_channels / 4, 18, 72),
                          threads);
}

void conv3x3_float_(at::Tensor out, const at::Tensor& x, const at::Tensor& packed,
                    const OptionalTensor& bias, const OptionalTensor& add,
                    const OptionalTensor& mask, bool relu, int64_t lanes) {
  TORCH_CHECK_VALUE(x.dim() == 4 && out.dim() == 4, "x must have axes [B, C, H, W], got ",
                    x.sizes());
  const Shape shape{x.size(0), x.size(2), x.size(3), x.size(1), out.size(1)};
  const FloatKernel& kernel = kernel_of(lanes, shape.in_channels);
  conv::check_dense<float>(x, "x", x.sizes());
  conv::check_dense<float>(out, "out",
                           {shape.batch, shape.out_channels, shape.height, shape.width});
  conv::check_packed<float>(
      packed, conv3x3::kPoints * shape.in_channels * conv::padded(shape.out_channels));
  const auto epilogue = conv::make_epilogue<float>(out, bias, add, mask, relu);
  float* to = out.data_ptr<float>();
  const float *from = x.const_data_ptr<float>(), *filters = packed.const_data_ptr<float>();
  const int64_t span = std::min(conv::padded(shape.out_channels), conv3x3::kFloatSpan);
  const int64_t floats = conv3x3::kPoints * (shape.in_channels + span);  // of a tile
  const int64_t threads = conv::useful_threads(shape.products());
  conv::parallel_shares(
      shape.tiles(), tiles_per_task(shape, threads),
      [&](int64_t count) { return floats * count * int64_t(sizeof(float)); },
      [&](int64_t first, int64_t count, void* scratch) {
        kernel.convolve(to, from, filters, shape, epilogue, first, count, scratch);
      },
      threads);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("conv3x3_float_pack_", &conv3x3_float_pack_);
  m.impl("conv3x3_float_", &conv3x3_float_);
}
// Not CatchAll, as in conv3x3.cpp.
TORCH_LIBRARY_IMPL(fastadv, CompositeExplicitAutograd, m) {
  m.impl("conv3x3_float_lanes", &conv3x3_float_lanes);
}

}  // namespace fastadv
