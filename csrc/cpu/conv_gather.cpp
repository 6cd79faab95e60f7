// Host side of the gathering convolution. Schema: fastadv/engine/cpu_convolution.py.
#include "cpu/conv_gather.h"

#include "cpu/conv_amx.h"
#include "cpu/conv_gather_arguments.h"

namespace fastadv {
namespace {

using conv_gather::Grid;
using conv_gather::Grids;

uint16_t* bits(at::Tensor& t) { return static_cast<uint16_t*>(t.data_ptr()); }
const uint16_t* bits(const at::Tensor& t) {
  return static_cast<const uint16_t*>(t.const_data_ptr());
}

Grids packed_grids(const at::Tensor& out, const at::Tensor& x, const at::Tensor& packed,
                   at::IntArrayRef tap_rows, at::IntArrayRef tap_columns, at::IntArrayRef taps,
                   at::IntArrayRef origins, at::IntArrayRef steps) {
  return conv_gather::grids_of<uint16_t>(
      out, x, packed, tap_rows, tap_columns, taps, origins, steps,
      [](const conv_gather::Shape& shape) { return conv::padded(shape.out_channels); });
}

void conv_gather_(at::Tensor out, const at::Tensor& x, const at::Tensor& packed,
                  at::IntArrayRef tap_rows, at::IntArrayRef tap_columns, at::IntArrayRef taps,
                  at::IntArrayRef origins, at::IntArrayRef steps, const OptionalTensor& bias,
                  const OptionalTensor& add, const OptionalTensor& mask, bool relu) {
  const Grids grids = packed_grids(out, x, packed, tap_rows, tap_columns, taps, origins, steps);
  TORCH_CHECK_VALUE(conv::supported() && x.size(1) % 2 == 0,
                    "x's channels must be even on a processor with AVX512-BF16, got ", x.sizes());
  const conv::Epilogue epilogue = conv::make_epilogue(out, bias, add, mask, relu);
  conv_gather::for_places(grids, sizeof(uint16_t), conv_gather::scratch_bytes,
                          [&, to = bits(out), from = bits(x), filters = bits(packed)](
                              const Grid& grid, int64_t first, int64_t count, void* scratch) {
                            conv_gather::convolve(to, from, filters + grid.filters, grid.shape,
                                                  epilogue, first, count, scratch);
                          });
}

bool conv_amx_supported(int64_t in_channels) {
  return in_channels > 0 && in_channels % conv_amx::kDepth == 0 && conv_amx::supported();
}

void conv_amx_pack_(at::Tensor packed, const at::Tensor& weight, const OptionalTensor& scale,
                    at::IntArrayRef taps, bool backward) {
  TORCH_CHECK_VALUE(weight.dim() == 4, "weight must have shape [K, C, h, w], got ", weight.sizes());
  const int64_t k = weight.size(0), c = weight.size(1), size = weight.size(2) * weight.size(3);
  const int64_t in = backward ? k : c, out = backward ? c : k;
  TORCH_CHECK_VALUE(conv_amx_supported(in), "weight's input channels (backward: output channels) ",
                    "must be multiples of 32 on a processor with AMX, got ", weight.sizes());
  for (const int64_t tap : taps) {
    TORCH_CHECK_VALUE(tap >= 0 && tap < size, "taps must be in 0 .. ", size - 1, ", got ", tap);
  }
  const int64_t depth = in * int64_t(taps.size());
  conv::check_packed(packed, conv::padded(out) * depth);
  const at::Tensor w = weight.to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor s = conv::checked_scale(scale, k);
  const conv_amx::Filters filters{w.const_data_ptr<float>(),
                                  s.defined() ? s.const_data_ptr<float>() : nullptr,
                                  out,
                                  in,
                                  size,
                                  backward,
                                  taps.data(),
                                  int64_t(taps.size())};
  auto* to = static_cast<uint16_t*>(packed.data_ptr());
  constexpr int64_t kBlock = conv_amx::kBlock;
  at::parallel_for(0, (out + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      conv_amx::pack(to + block * kBlock * depth, filters, block * kBlock);
    }
  });
}

void conv_amx_(at::Tensor out, const at::Tensor& x, const at::Tensor& packed,
               at::IntArrayRef tap_rows, at::IntArrayRef tap_columns, at::IntArrayRef taps,
               at::IntArrayRef origins, at::IntArrayRef steps, const OptionalTensor& bias,
               const OptionalTensor& add, const OptionalTensor& mask, bool relu) {
  const Grids grids = packed_grids(out, x, packed, tap_rows, tap_columns, taps, origins, steps);
  TORCH_CHECK_VALUE(conv_amx_supported(x.size(1)),
                    "x's channels must be multiples of 32 on a processor with AMX, got ",
                    x.sizes());
  const conv::Epilogue epilogue = conv::make_epilogue(out, bias, add, mask, relu);
  for (const Grid& grid : grids) {
    const conv_amx::Plan plan(grid.shape, at::get_num_threads());
    conv::parallel_shares(
        plan.parts(), 1, [&](int64_t) { return plan.scratch_bytes(); },
        [&, to = bits(out), from = bits(x), filters = bits(packed) + grid.filters](
            int64_t part, int64_t, void* scratch) {
          conv_amx::convolve(to, from, filters, plan, epilogue, part, scratch);
        });
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("conv_gather_", &conv_gather_);
  m.impl("conv_amx_pack_", &conv_amx_pack_);
  m.impl("conv_amx_", &conv_amx_);
}
// Not CatchAll, as in conv3x3.cpp.
TORCH_LIBRARY_IMPL(fastadv, CompositeExplicitAutograd, m) {
  m.impl("conv_amx_supported", &conv_amx_supported);
}

}  // namespace fastadv
