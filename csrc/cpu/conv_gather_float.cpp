// Host side of the gathering convolution in float32. Schema: fastadv/engine/cpu_convolution.py.
#include "cpu/conv_gather_float.h"

#include "cpu/conv_gather_arguments.h"
#include "cpu/simd.h"

namespace fastadv {
namespace {

using conv_gather::FloatKernel;
using conv_gather::Shape;

const FloatKernel& kernel_of(int64_t lanes) {
  const bool wide = kSimdLevel == SimdLevel::kAvx512 && lanes == conv_gather::kFloatAvx512.lanes;
  const bool narrow = kSimdLevel != SimdLevel::kBaseline && lanes == conv_gather::kFloatAvx2.lanes;
  TORCH_CHECK_VALUE(lanes > 0 && (wide || narrow),
                    "lanes must be 16 on a processor with AVX-512, or 8 on one with AVX2, got ",
                    lanes);
  return wide ? conv_gather::kFloatAvx512 : conv_gather::kFloatAvx2;
}

void conv_gather_float_(at::Tensor out, const at::Tensor& x, const at::Tensor& packed,
                        at::IntArrayRef tap_rows, at::IntArrayRef tap_columns,
                        at::IntArrayRef steps, at::IntArrayRef origin, const OptionalTensor& bias,
                        const OptionalTensor& add, const OptionalTensor& mask, bool relu,
                        int64_t lanes) {
  const FloatKernel& kernel = kernel_of(lanes);
  const Shape shape = conv_gather::shape_of<float>(out, x, tap_rows, tap_columns, steps, origin);
  conv::check_packed<float>(packed, conv_gather::packed_floats(shape));
  const auto epilogue = conv::make_epilogue<float>(out, bias, add, mask, relu);
  const auto convolve = kernel.of(shape);
  float* to = out.data_ptr<float>();
  const float *from = x.const_data_ptr<float>(), *filters = packed.const_data_ptr<float>();
  conv::parallel_shares(
      shape.places(), conv_gather::places_per_task(shape, sizeof(float)),
      [&](int64_t count) { return conv_gather::float_scratch_bytes(shape, count); },
      [&](int64_t first, int64_t count, void* scratch) {
        convolve(to, from, filters, shape, epilogue, first, count, scratch);
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("conv_gather_float_", &conv_gather_float_); }

}  // namespace fastadv
