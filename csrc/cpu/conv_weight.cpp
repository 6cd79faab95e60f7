// Host side of the gradient of a convolution in its weights. Schema:
// fastadv/engine/cpu_training.py.
#include "cpu/conv_amx.h"
#include "cpu/conv_tensor.h"
#include "cpu/conv_weight_amx.h"

namespace fastadv {
namespace {

using conv_weight::kChannels;

int64_t results(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

bool conv_weight_serves(int64_t in_channels, int64_t out_channels) {
  return conv_amx::supported() && in_channels > 0 && out_channels > 0 &&
         in_channels % kChannels == 0 && out_channels % kChannels == 0;
}

void conv_weight_gradient_(at::Tensor out, const at::Tensor& gradient, const at::Tensor& x,
                           at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation) {
  TORCH_CHECK_VALUE(out.dim() == 4 && gradient.dim() == 4 && x.dim() == 4,
                    "out, gradient and x must have 4 axes, got ", out.dim(), ", ", gradient.dim(),
                    " and ", x.dim());
  TORCH_CHECK_VALUE(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "stride, padding and dilation must be pairs");
  const int64_t batch = x.size(0), in = x.size(1), outs = gradient.size(1);
  TORCH_CHECK_VALUE(conv_weight_serves(in, outs),
                    "this operation needs a processor with AMX, and channels in multiples of ",
                    kChannels, ", got ", in, " and ", outs);
  for (int64_t axis = 0; axis < 2; ++axis) {
    TORCH_CHECK_VALUE(stride[axis] > 0 && padding[axis] >= 0 && dilation[axis] > 0,
                      "stride and dilation must be positive, and padding at least 0");
  }
  conv::check_dense(x, "x", {batch, in, x.size(2), x.size(3)});
  conv::check_dense(
      gradient, "gradient",
      {batch, outs, results(x.size(2), out.size(2), stride[0], padding[0], dilation[0]),
       results(x.size(3), out.size(3), stride[1], padding[1], dilation[1])});
  conv::check_dense<float>(out, "out", {outs, in, out.size(2), out.size(3)});
  if (gradient.numel() == 0 || out.numel() == 0) {
    out.zero_();
    return;
  }
  const conv_weight::Plan plan({batch, in, outs, x.size(2), x.size(3), gradient.size(2),
                                gradient.size(3), out.size(2), out.size(3), stride[0], stride[1],
                                padding[0], padding[1], dilation[0], dilation[1]});
  // With few channels there are as many parts as columns of the filter, or some threads would wait.
  const int64_t threads = at::get_num_threads();
  const int64_t splits = plan.parts() < 2 * threads ? int64_t(plan.groups.size()) : 1;
  const int64_t sums_kept = plan.chunks() > 1 ? plan.parts() : 0;  // from chunk to chunk
  // All begin at a line of the caches.
  const int64_t gradient_size = plan.gradient_elements(), input_size = plan.input_elements();
  const int64_t sum_size = sums_kept * plan.sum_elements();
  auto* sums = static_cast<float*>(
      thread_scratch(sum_size * int64_t(sizeof(float)) + (gradient_size + input_size) * 2));
  auto* gradients = reinterpret_cast<uint16_t*>(sums + sum_size);
  auto* inputs = gradients + gradient_size;
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  const auto* at_results = static_cast<const uint16_t*>(gradient.const_data_ptr());
  float* to = out.data_ptr<float>();
  const int64_t rows = conv_weight::input_rows(plan), filters = outs / kChannels;
  const auto group_start = [&](int64_t group) {
    return std::ranges::find_if(plan.taps, [&](const auto& tap) { return tap.group >= group; }) -
           plan.taps.begin();
  };
  for (int64_t chunk = 0; chunk < plan.chunks(); ++chunk) {
    at::parallel_for(0, plan.steps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        conv_weight::pack_gradient(gradients, at_results, plan, chunk, i);
      }
    });
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        conv_weight::pack_input(inputs, from, plan, chunk, i);
      }
    });
    at::parallel_for(0, plan.parts() * splits, 1, [&](int64_t begin, int64_t end) {
      conv_amx::configure();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i / splits, groups = int64_t(plan.groups.size()) / splits;
        const int64_t group = i % splits * groups;
        conv_weight::multiply(to, sums + (sums_kept ? part : 0) * plan.sum_elements(), gradients,
                              inputs, plan, chunk,
                              {part % filters * kChannels, part / filters * kChannels,
                               group_start(group), group_start(group + groups)});
      }
      conv_amx::release();
    });
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CompositeExplicitAutograd, m) {
  m.impl("conv_weight_serves", &conv_weight_serves);
}
TORCH_LIBRARY_IMPL(fastadv, CPU, m) { m.impl("conv_weight_gradient_", &conv_weight_gradient_); }

}  // namespace fastadv
