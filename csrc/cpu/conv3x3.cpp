// Host side of the Winograd convolution: what the attack engine's programs call. Schemas:
// fastadv/engine/cpu_convolution.py.
#include "cpu/conv3x3.h"

#include "cpu/conv_tensor.h"

namespace fastadv {
namespace {

using conv3x3::Filters;
using conv3x3::Shape;

// Tiles of one task. Few keep a task's inputs and products in a core's second-level cache; but
// every task reads all filters, so many channels want many tiles. Measured best: 18 at 64 and 128
// channels, 24 at 256, about 50 at 512. All threads get the same number of tasks, or nearly so. The
// results do not depend on the number of tiles.
int64_t tiles_per_task(const Shape& shape, int64_t threads) {
  return conv::even_share(shape.tiles(), std::clamp<int64_t>(shape.in_channels / 10, 18, 60),
                          threads);
}

bool conv3x3_supported(int64_t in_channels, int64_t out_channels) {
  return conv::supported() && in_channels > 0 && out_channels > 0 &&
         in_channels % conv::kVector == 0;
}

void conv3x3_pack_(at::Tensor packed, const at::Tensor& weight, const OptionalTensor& scale,
                   bool backward) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                    "weight must have shape [K, C, 3, 3], got ", weight.sizes());
  const int64_t k = weight.size(0), c = weight.size(1);
  const int64_t in = backward ? k : c, out = backward ? c : k;
  TORCH_CHECK_VALUE(
      conv3x3_supported(in, out), "weight's input channels (backward: output channels) ",
      "must be multiples of 16 on a processor with AVX512-BF16, got ", weight.sizes());
  conv::check_packed(packed, conv3x3::kPoints * in * conv::padded(out));
  const bool last = !weight.is_contiguous() && weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor wide = weight.to(at::kFloat), w = last ? wide : wide.contiguous();
  const int64_t tap = last ? c : 1, channel = last ? 1 : 9;
  const at::Tensor s = conv::checked_scale(scale, k);
  const float* factors = s.defined() ? s.const_data_ptr<float>() : nullptr;
  const float* source = w.const_data_ptr<float>();
  const Filters filters =
      backward ? Filters{source, channel, 9 * c, tap, true, factors, true, in, out}
               : Filters{source, 9 * c, channel, tap, false, factors, false, in, out};
  auto* to = static_cast<uint16_t*>(packed.data_ptr());
  at::parallel_for(0, conv::padded(out) / conv::kVector, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      conv3x3::transform_filters(to, filters, i * conv::kVector);
    }
  });
}

void conv3x3_(at::Tensor out, const at::Tensor& x, const at::Tensor& packed,
              const OptionalTensor& bias, const OptionalTensor& add, const OptionalTensor& mask,
              bool relu) {
  TORCH_CHECK_VALUE(x.dim() == 4 && out.dim() == 4, "x must have axes [B, C, H, W], got ",
                    x.sizes());
  const Shape shape{x.size(0), x.size(2), x.size(3), x.size(1), out.size(1)};
  TORCH_CHECK_VALUE(conv3x3_supported(shape.in_channels, shape.out_channels),
                    "x's channels must be multiples of 16 on a processor with AVX512-BF16, got ",
                    x.sizes());
  conv::check_dense(x, "x", x.sizes());
  conv::check_dense(out, "out", {shape.batch, shape.out_channels, shape.height, shape.width});
  conv::check_packed(packed,
                     conv3x3::kPoints * shape.in_channels * conv::padded(shape.out_channels));
  const conv::Epilogue epilogue = conv::make_epilogue(out, bias, add, mask, relu);
  auto* to = static_cast<uint16_t*>(out.data_ptr());
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  const auto* filters = static_cast<const uint16_t*>(packed.const_data_ptr());
  const int64_t threads = conv::useful_threads(shape.products());
  conv::parallel_shares(
      shape.tiles(), tiles_per_task(shape, threads),
      [&](int64_t count) { return conv3x3::scratch_bytes(shape, count); },
      [&](int64_t first, int64_t count, void* scratch) {
        conv3x3::convolve(to, from, filters, shape, epilogue, first, count, scratch);
      },
      threads);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("conv3x3_pack_", &conv3x3_pack_);
  m.impl("conv3x3_", &conv3x3_);
}
// Not CatchAll: torch.compile looks up the schema of every op that is registered as CatchAll, and
// the schema of this op exists only after the attack engine has been imported.
TORCH_LIBRARY_IMPL(fastadv, CompositeExplicitAutograd, m) {
  m.impl("conv3x3_supported", &conv3x3_supported);
}

}  // namespace fastadv
