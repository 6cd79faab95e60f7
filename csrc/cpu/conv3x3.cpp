// Host side of the Winograd convolution: what the attack engine's programs call. Schemas:
// fastadv/attacks/convolution.py.
#include "cpu/conv3x3.h"

#include <ATen/ops/empty.h>

#include <memory>

#include "cpu/tensor.h"

namespace fastadv {
namespace {

using conv3x3::Epilogue;
using conv3x3::Filters;
using conv3x3::Shape;

// Tiles of one task. Few keep a task's inputs and products in a core's second-level cache; but
// every task reads all filters, so many channels want many tiles. Measured best: 18 at 64 and 128
// channels, 24 at 256, about 50 at 512. All threads get alike numbers of tasks. The results do not
// depend on it.
int64_t tiles_per_task(const Shape& shape) {
  const int64_t wanted = std::clamp<int64_t>(shape.in_channels / 10, 18, 60);
  const int64_t threads = at::get_num_threads(), tiles = std::max<int64_t>(shape.tiles(), 1);
  const int64_t tasks = (tiles + wanted - 1) / wanted;
  const int64_t even_tasks = (tasks + threads - 1) / threads * threads;
  return (tiles + even_tasks - 1) / even_tasks;
}

// Scratch memory of a thread, kept between calls: fresh memory costs a page fault every 4 KiB.
void* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<std::byte[]> memory;
  thread_local int64_t size = 0;
  if (size < bytes + 64) {
    memory.reset(new std::byte[bytes + 64]);
    size = bytes + 64;
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}

void check_dense(const at::Tensor& t, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kBFloat16 && t.sizes() == sizes &&
                        t.is_contiguous(at::MemoryFormat::ChannelsLast),
                    name, " must be channels-last bfloat16 of shape ", sizes, ", got ",
                    t.scalar_type(), " of shape ", t.sizes());
}

const uint16_t* bits(const OptionalTensor& t) {
  return t ? static_cast<const uint16_t*>(t->const_data_ptr()) : nullptr;
}

bool conv3x3_supported(int64_t in_channels, int64_t out_channels) {
  return conv3x3::supported() && in_channels > 0 && out_channels > 0 &&
         in_channels % conv3x3::kVector == 0 && out_channels % conv3x3::kVector == 0;
}

void conv3x3_pack_(at::Tensor packed, const at::Tensor& weight, const OptionalTensor& scale,
                   bool backward) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                    "weight must have shape [K, C, 3, 3], got ", weight.sizes());
  const int64_t k = weight.size(0), c = weight.size(1);
  TORCH_CHECK_VALUE(conv3x3_supported(c, k),
                    "weight's channels must be multiples of 16 on a processor ",
                    "with AVX512-BF16, got ", weight.sizes());
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kBFloat16 && packed.is_contiguous() &&
                        packed.numel() == conv3x3::kPoints * k * c,
                    "packed must be bfloat16 with ", conv3x3::kPoints * k * c, " elements, got ",
                    packed.numel());
  const at::Tensor w = weight.to(at::kFloat).contiguous();
  const at::Tensor s = scale ? scale->to(at::kFloat).contiguous() : at::Tensor();
  const float* factors = s.defined() ? s.const_data_ptr<float>() : nullptr;
  const float* source = w.const_data_ptr<float>();
  const Filters filters = backward ? Filters{source, 9, 9 * c, true, factors, true, k, c}
                                   : Filters{source, 9 * c, 9, false, factors, false, c, k};
  auto* to = static_cast<uint16_t*>(packed.data_ptr());
  at::parallel_for(0, filters.out_channels / conv3x3::kVector, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      conv3x3::transform_filters(to, filters, i * conv3x3::kVector);
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
  check_dense(x, "x", x.sizes());
  check_dense(out, "out", {shape.batch, shape.out_channels, shape.height, shape.width});
  if (add) check_dense(*add, "add", out.sizes());
  if (mask) check_dense(*mask, "mask", out.sizes());
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kBFloat16 && packed.is_contiguous() &&
                        packed.numel() == conv3x3::kPoints * shape.in_channels * shape.out_channels,
                    "packed does not fit these channels: ", packed.numel(), " elements");
  TORCH_CHECK_VALUE(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() &&
                              bias->numel() == shape.out_channels),
                    "bias must be float32 of shape [", shape.out_channels, "]");
  const Epilogue epilogue{bias ? bias->const_data_ptr<float>() : nullptr, bits(add), bits(mask),
                          relu};
  auto* to = static_cast<uint16_t*>(out.data_ptr());
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  const auto* filters = static_cast<const uint16_t*>(packed.const_data_ptr());
  const int64_t per_task = tiles_per_task(shape);
  const int64_t tiles = shape.tiles(), tasks = (tiles + per_task - 1) / per_task;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * per_task, count = std::min(per_task, tiles - first);
      void* scratch = thread_scratch(conv3x3::scratch_bytes(shape, count));
      conv3x3::convolve(to, from, filters, shape, epilogue, first, count, scratch);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("conv3x3_pack_", &conv3x3_pack_);
  m.impl("conv3x3_", &conv3x3_);
}
TORCH_LIBRARY_IMPL(fastadv, CatchAll, m) { m.impl("conv3x3_supported", &conv3x3_supported); }

}  // namespace fastadv
