// Host side of the gathering convolution in float32. Schema: fastadv/engine/cpu_convolution.py.
#include "cpu/conv_gather_float.h"

#include "cpu/conv_gather_arguments.h"
#include "cpu/simd.h"

namespace fastadv {
namespace {

using conv_gather::FloatKernel;

const FloatKernel& kernel_of(int64_t lanes) {
  const bool wide = kSimdLevel == SimdLevel::kAvx512 && lanes == conv_gather::kFloatAvx512.lanes;
  const bool narrow = kSimdLevel != SimdLevel::kBaseline && lanes == conv_gather::kFloatAvx2.lanes;
  TORCH_CHECK_VALUE(lanes > 0 && (wide || narrow),
                    "lanes must be 16 on a processor with AVX-512, or 8 on one with AVX2, got ",
                    lanes);
  return wide ? conv_gather::kFloatAvx512 : conv_gather::kFloatAvx2;
}

void conv_gather_float_(at::Tensor out, const at::Tensor& x, const at::Tensor& packed,
                        at::IntArrayRef tap_rows, at::IntArrayRef tap_columns, at::IntArrayRef taps,
                        at::IntArrayRef origins, at::IntArrayRef steps, const OptionalTensor& bias,
                        const OptionalTensor& add, const OptionalTensor& mask, bool relu,
                        int64_t lanes) {
  const FloatKernel& kernel = kernel_of(lanes);
  const auto grids = conv_gather::grids_of<float>(out, x, packed, tap_rows, tap_columns, taps,
                                                  origins, steps, conv_gather::packed_channels);
  const auto epilogue = conv::make_epilogue<float>(out, bias, add, mask, relu);
  float* to = out.data_ptr<float>();
  const float *from = x.const_data_ptr<float>(), *filters = packed.const_data_ptr<float>();
  conv_gather::for_places(
      grids, sizeof(float), conv_gather::float_scratch_bytes,
      [&](const conv_gather::Grid& grid, int64_t first, int64_t count, void* scratch) {
        kernel.of(grid.shape)(to, from, filters + grid.filters, grid.shape, epilogue, first, count,
                              scratch);
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("conv_gather_float_", &conv_gather_float_); }

}  // namespace fastadv
