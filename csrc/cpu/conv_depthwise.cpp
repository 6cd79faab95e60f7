// Host side of the depthwise convolution. Schema: fastadv/engine/cpu_channels.py.
#include "cpu/conv_depthwise.h"

#include "cpu/conv_tensor.h"

namespace fastadv {
namespace {

using conv_depthwise::kBlock;
using conv_depthwise::Shape;

bool conv_depthwise_serves(int64_t tap_columns, int64_t in_step) {
  return conv_depthwise::serves(tap_columns, in_step);
}

// Two numbers, of rows and columns.
void check_two(at::IntArrayRef numbers, const char* name, int64_t least) {
  TORCH_CHECK_VALUE(numbers.size() == 2 && numbers[0] >= least && numbers[1] >= least, name,
                    " must be two numbers of at least ", least, ", got ", numbers);
}

Shape shape_of(const at::Tensor& out, const at::Tensor& x, const at::Tensor& packed,
               at::IntArrayRef first_tap, at::IntArrayRef taps, at::IntArrayRef steps,
               at::IntArrayRef origin) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && out.dim() == 4 && x.size(0) == out.size(0) && x.size(1) == out.size(1),
      "x and out must have axes [B, C, H, W] and one B and C, got ", x.sizes(), " and ",
      out.sizes());
  check_two(first_tap, "first_tap", std::numeric_limits<int32_t>::min());
  check_two(taps, "taps", 1);
  check_two(steps, "steps", 1);
  check_two(origin, "origin", 0);
  TORCH_CHECK_VALUE(origin[0] <= out.size(2) && origin[1] <= out.size(3),
                    "origin must be a place (row, column) of out, got ", origin);
  TORCH_CHECK_VALUE(conv_depthwise::serves(taps[1], steps[0]),
                    "taps and steps must be served on a processor with AVX512-BF16, got ", taps,
                    " and ", steps);
  conv::check_dense(x, "x", x.sizes());
  conv::check_dense(out, "out", out.sizes());
  const Shape shape{x.size(0),    x.size(1),    x.size(2), x.size(3), out.size(2),
                    out.size(3),  steps[0],     steps[1],  origin[0], origin[1],
                    first_tap[0], first_tap[1], taps[0],   taps[1]};
  const int64_t elements = shape.blocks() * kBlock * taps[0] * taps[1];
  TORCH_CHECK_VALUE(
      packed.scalar_type() == at::kFloat && packed.is_contiguous() && packed.numel() == elements,
      "packed must be float32 with ", elements, " elements, got ", packed.numel());
  return shape;
}

// A bias [C] as the inner loops read it: the even channels of each block before the odd ones.
std::vector<float> in_blocks(const float* bias, const Shape& shape) {
  std::vector<float> blocks(shape.blocks() * kBlock, 0.0f);
  for (int64_t c = 0; c < shape.channels; ++c) {
    blocks[c / kBlock * kBlock + c % 2 * (kBlock / 2) + c % kBlock / 2] = bias[c];
  }
  return blocks;
}

void conv_depthwise_(at::Tensor out, const at::Tensor& x, const at::Tensor& packed,
                     at::IntArrayRef first_tap, at::IntArrayRef taps, at::IntArrayRef steps,
                     at::IntArrayRef origin, const OptionalTensor& bias, const OptionalTensor& add,
                     const OptionalTensor& mask, bool relu) {
  const Shape shape = shape_of(out, x, packed, first_tap, taps, steps, origin);
  conv::Epilogue epilogue = conv::make_epilogue(out, bias, add, mask, relu);
  std::vector<float> blocks;
  if (epilogue.bias) {
    blocks = in_blocks(epilogue.bias, shape);
    epilogue.bias = blocks.data();
  }
  const int64_t height = shape.grid_height();
  const int64_t work =
      std::max<int64_t>(1, shape.grid_width() * shape.channels * taps[0] * taps[1]);
  auto* to = static_cast<uint16_t*>(out.data_ptr());
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  const float* filters = packed.const_data_ptr<float>();
  at::parallel_for(0, shape.batch * height, std::max<int64_t>(1, 4 * kGrain / work),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) {
                       conv_depthwise::convolve(to, from, filters, shape, epilogue, row / height,
                                                row % height);
                     }
                   });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("conv_depthwise_", &conv_depthwise_); }
// Not CatchAll, as in conv3x3.cpp.
TORCH_LIBRARY_IMPL(fastadv, CompositeExplicitAutograd, m) {
  m.impl("conv_depthwise_serves", &conv_depthwise_serves);
}

}  // namespace fastadv
