// Operators of the pretended GPU that make tensors, give them storages, and copy to and from the
// host.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/CPUAllocator.h>

#include "kernels.h"

namespace rehearsal {
namespace {

using at::Tensor;
using Stack = torch::jit::Stack;

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), c10::GetAllocator(kCuda.type()),
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      c10::GetAllocator(kCuda.type()), c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype.value_or(at::get_default_dtype_as_scalartype()));
}

Tensor& set_storage(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  std::vector<int64_t> strides = C10_AS_INTARRAYREF_SLOW(stride).vec();
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (strides.empty() && !sizes.empty()) {
    strides.assign(sizes.size(), 1);
    for (auto i = static_cast<int64_t>(sizes.size()) - 2; i >= 0; --i) {
      strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
    }
  }
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset.expect_int());
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source.storage());
  set_geometry(self, source);
  return self;
}

// A tensor of the CPU with the contents of one of the device; for reading.
Tensor host_view(const Tensor& t) {
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(),
      c10::DataPtr(t.storage().mutable_data(), at::kCPU), c10::GetCPUAllocator(), false);
  return make_tensor(storage, c10::DispatchKey::CPU, t);
}

Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking) {
  auto& device = Device::get();
  if (self.is_cuda() && src.is_cuda()) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    Stack stack{self, src, non_blocking};
    launch(op, c10::DispatchKeySet(), &stack);
    return self;
  }
  const auto& host = self.is_cuda() ? src : self;
  const auto& ours = self.is_cuda() ? self : src;
  const bool pinned = host.is_pinned();
  if (!non_blocking || !pinned) {
    device.host_wait(self.is_cuda() ? "a copy from the host" : "a copy to the host");
  }
  TORCH_CHECK(!device.capturing(), "the rehearsal does not record copies of pinned memory");
  if (auto block = block_of(ours.storage().data_ptr())) {
    device.access({{block, self.is_cuda(), false}}, "aten::copy_");
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  if (self.is_cuda()) {
    host_view(self).copy_(src.expand_as(self));
  } else {
    self.copy_(host_view(src));
  }
  return self;
}

void record_stream(Tensor& self, c10::Stream stream) {
  if (auto block = block_of(self.storage().data_ptr())) {
    block->recorded.insert(stream.id());
  }
}

int64_t use_plain_attention(const Tensor&, const Tensor&, const Tensor&,
                            const std::optional<Tensor>&, double, bool, std::optional<double>,
                            bool) {
  return 0;
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("copy_", copy_);
  m.impl("record_stream", record_stream);
  m.impl("_fused_sdp_choice", use_plain_attention);
}

}  // namespace rehearsal
