#include "kernels.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <optional>
#include <unordered_map>
#include <unordered_set>

namespace rehearsal {
namespace {

using at::Tensor;
using c10::IValue;
using Stack = torch::jit::Stack;

// The shape of what they return depends on values, for which the host waits.
const std::unordered_set<std::string> kShapeByValue = {
    "aten::nonzero",    "aten::masked_select",
    "aten::_unique",    "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount",   "aten::unique_dim_consecutive",
};
// They return numbers that do not depend on values.
const std::unordered_set<std::string> kKnownNumbers = {
    "aten::is_set_to",
    "aten::_has_same_storage_numel",
    "aten::is_pinned",
    "aten::is_same_size",
};
// Indices may be on the CPU. Of aten::index torch itself copies them, and asks for the places of a
// mask.
const std::unordered_set<std::string> kIndexing = {"aten::index", "aten::index_put_",
                                                   "aten::_index_put_impl_"};

bool on_device(const Tensor& t) { return t.defined() && t.is_cuda(); }

bool is_bool_index(const Tensor& t) {
  return t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
}

// Numbers of Python do not take part in the choice of a dtype.
void take_kind(const Tensor& t, const Tensor& like) {
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
    t.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
}

c10::Storage device_storage(const c10::Storage& contents) {
  auto data = Device::get().allocate(contents.nbytes());
  if (contents.nbytes()) {
    std::memcpy(data.get(), contents.data(), contents.nbytes());
  }
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(),
                                               contents.nbytes(), std::move(data),
                                               c10::GetAllocator(kCuda.type()), true);
}

// One call of an operator, and the tensors of the CPU that stand for tensors of the device.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack given)
      : op_(op), schema_(op.schema()), given_(std::move(given)) {
    check_waits();
    auto& device = Device::get();
    recording_ = static_cast<Graph*>(device.capturing());
    for (size_t i = 0; i < given_.size(); ++i) {
      const auto& argument = schema_.arguments()[i];
      writes_ = argument.alias_info() && argument.alias_info()->isWrite();
      arguments_.push_back(on_host(given_[i], argument.type()));
    }
    for (const auto& result : schema_.returns()) {
      is_view_ |= result.alias_info() && !result.alias_info()->isWrite();
    }
    if (is_view_) {
      recording_ = nullptr;  // it touches no memory
    } else {
      device.access(uses_, schema_.name());
    }
  }

  void run(Stack* stack) {
    Stack results = arguments_;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &results);
    }
    if (recording_) {
      recording_->launches.push_back({op_, arguments_, uses_, {}});
    }
    for (const auto& [theirs, ours] : pairs_) {
      take_geometry(theirs, ours);
    }
    for (size_t i = 0; i < results.size(); ++i) {
      place_ = i;
      stack->push_back(on_the_device(results[i]));
    }
    if (recording_) {
      for (auto& use : recording_->launches.back().uses) {
        use.own = recording_->fresh.contains(use.block);
      }
    }
  }

 private:
  void check_waits() const {
    const auto& name = schema_.name();
    auto& device = Device::get();
    bool waits = kShapeByValue.contains(name);
    for (const auto& result : schema_.returns()) {
      const auto kind = result.type()->kind();
      waits |= kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType &&
               !kKnownNumbers.contains(name);
    }
    if (name == "aten::repeat_interleave") {
      waits |= given_.back().isNone();
    }
    if (kIndexing.contains(name) && name != "aten::index") {
      bool copies = false, masks = false;
      for (const auto& index : given_[1].toOptionalTensorVector()) {
        copies |= index && index->defined() && index->is_cpu() && index->dim() > 0;
        masks |= index && is_bool_index(*index);
      }
      const bool fills = given_[2].toTensor().is_cpu();  // a mask alone, as by masked_fill_
      waits |= copies || (masks && !fills);
    }
    if (waits) {
      device.host_wait(c10::toString(op_.operator_name()));
    }
  }

  IValue on_host(const IValue& value, const c10::TypePtr& type) {
    if (value.isTensor()) {
      return host_tensor(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<Tensor> found;
      for (const Tensor& t : value.toTensorVector()) {
        found.push_back(host_tensor(t));
      }
      return found;
    }
    if (value.isList() && value.toListRef().size() && is_optional_tensors(value)) {
      c10::List<std::optional<Tensor>> found;
      for (const auto& t : value.toOptionalTensorVector()) {
        found.push_back(t ? std::optional(host_tensor(*t)) : std::nullopt);
      }
      return found;
    }
    if (value.isGenerator()) {
      return host_generator(value.toGenerator());
    }
    if (value.isNone() && type->str() == "Generator?") {
      return host_generator(default_generator());
    }
    if (value.isDevice()) {
      return c10::Device(at::kCPU);
    }
    TORCH_CHECK(!value.isStorage(), "the pretended GPU does not know ", schema_.name(),
                " with a storage");
    return value;
  }

  static bool is_optional_tensors(const IValue& value) {
    const auto kind = value.toList().elementType();
    return kind->kind() == c10::TypeKind::OptionalType && kind->str() == "Tensor?";
  }

  Tensor host_tensor(const Tensor& t) {
    if (!on_device(t)) {
      const bool may_differ = !t.defined() || t.dim() == 0 || kIndexing.contains(schema_.name());
      TORCH_CHECK(may_differ && !(writes_ && t.defined()),
                  "Expected all tensors to be on the same device, but found at least two devices, "
                  "cuda:0 and cpu! (",
                  schema_.name(), ")");
      if (!recording_ || !t.defined()) {
        return t;
      }
      auto kept = t.clone();  // a kernel gets the number, and keeps it
      take_kind(kept, t);
      return kept;
    }
    for (const auto& [theirs, ours] : pairs_) {
      if (theirs.is_same(t)) {
        add_use(t);
        return ours;
      }
    }
    TORCH_CHECK(t.layout() == at::kStrided, "the pretended GPU does not know the layout ",
                t.layout());
    auto& storage = storages_[t.storage().unsafeGetStorageImpl()];
    if (!storage) {
      storage = c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(),
          c10::DataPtr(t.storage().mutable_data(), at::kCPU), c10::GetCPUAllocator(), true);
    }
    auto made = make_tensor(*storage, c10::DispatchKey::CPU, t);
    take_kind(made, t);
    pairs_.emplace_back(t, made);
    add_use(t);
    return made;
  }

  void add_use(const Tensor& t) {
    if (auto block = block_of(t.storage().data_ptr())) {
      uses_.push_back({block, writes_, false});
    }
  }

  // An operator that writes may have given its argument another size.
  void take_geometry(const Tensor& theirs, const Tensor& ours) {
    if (ours.storage().data() != theirs.storage().data()) {
      auto* storage = theirs.storage().unsafeGetStorageImpl();
      auto moved = device_storage(ours.storage());
      storage->set_data_ptr_noswap(
          std::move(moved.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
      storage->set_nbytes(ours.storage().nbytes());
      ours.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(
          {storage->mutable_data(), at::kCPU});
      note_result(storage->data_ptr());
    }
    if (!theirs.sizes().equals(ours.sizes()) || !theirs.strides().equals(ours.strides()) ||
        theirs.storage_offset() != ours.storage_offset()) {
      set_geometry(theirs, ours);
    }
  }

  IValue on_the_device(const IValue& value) {
    if (value.isTensor()) {
      return device_tensor(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<Tensor> found;
      for (const Tensor& t : value.toTensorVector()) {
        TORCH_CHECK(!recording_ || is_known(t), "the rehearsal does not record ", schema_.name(),
                    ": a list of new tensors");
        found.push_back(device_tensor(t));
      }
      return found;
    }
    return value;
  }

  bool is_known(const Tensor& t) const {
    for (const auto& [_, ours] : pairs_) {
      if (ours.is_alias_of(t)) {
        return true;
      }
    }
    return false;
  }

  Tensor device_tensor(const Tensor& t) {
    if (!t.defined()) {
      return t;
    }
    for (const auto& [theirs, ours] : pairs_) {
      if (ours.is_same(t)) {
        return theirs;
      }
    }
    for (const auto& [theirs, ours] : pairs_) {
      if (ours.is_alias_of(t)) {
        return make_tensor(theirs.storage(), c10::DispatchKey::CUDA, t);
      }
    }
    auto made = make_tensor(device_storage(t.storage()), c10::DispatchKey::CUDA, t);
    const auto bytes = int64_t(made.storage().nbytes());
    if (note_result(made.storage().data_ptr()) && recording_) {
      auto memory = at::from_blob(made.storage().mutable_data(), {bytes}, at::kByte);
      recording_->launches.back().results.emplace_back(place_, memory);
    }
    return made;
  }

  // Notes that the kernel writes new memory; false where there are no bytes.
  bool note_result(const c10::DataPtr& data) {
    const auto block = block_of(data);
    if (!block) {
      return false;
    }
    Device::get().access({{block, true, true}}, schema_.name());
    if (recording_) {
      recording_->launches.back().uses.push_back({block, true, true});
    }
    return true;
  }

  c10::OperatorHandle op_;
  const c10::FunctionSchema& schema_;
  Stack given_, arguments_;
  Graph* recording_ = nullptr;
  bool writes_ = false, is_view_ = false;
  size_t place_ = 0;
  std::vector<Use> uses_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;
  std::unordered_map<c10::StorageImpl*, std::optional<c10::Storage>> storages_;
};

}  // namespace

void set_geometry(const Tensor& t, const Tensor& like) {
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                 like.storage_offset());
}

Tensor make_tensor(c10::Storage storage, c10::DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key),
                                                       like.dtype());
  set_geometry(made, like);
  return made;
}

void launch(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto count = op.schema().arguments().size();
  Stack given(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  torch::jit::drop(*stack, count);
  Call(op, std::move(given)).run(stack);
}

void Graph::replay() const {
  auto& device = Device::get();
  TORCH_CHECK(!device.capturing(), "the rehearsal does not record replays");
  device.before_replay(pool);
  for (const auto& launch : launches) {
    const auto& name = launch.op.schema().name();
    for (const auto& use : launch.uses) {
      if (!use.block->data || (!use.own && !use.block->live)) {
        device.fault("a replay of " + name + " uses memory that was freed");
      }
    }
    device.access(launch.uses, name);
    Stack stack = launch.arguments;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      launch.op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
    }
    for (const auto& [place, memory] : launch.results) {
      const auto found = stack[place].toTensor();
      TORCH_CHECK(int64_t(found.storage().nbytes()) == memory.numel(), name, " made another size");
      std::memcpy(memory.data_ptr(), found.storage().data(), memory.numel());
    }
  }
}

// For an op of fastadv without a kernel for GPUs, a kernel of the CPU would hide that it is
// missing.
void launch_if_of_torch(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  TORCH_CHECK_NOT_IMPLEMENTED(op.schema().name().rfind("fastadv::", 0) != 0, "Could not run '",
                              op.schema().name(), "' with arguments from the 'CUDA' backend.");
  launch(op, keys, stack);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&launch_if_of_torch>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // torch would choose among kernels of GPUs, which are not here.
  for (const auto* name : {"convolution", "convolution_backward", "_weight_norm_interface"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&launch>());
  }
}

}  // namespace rehearsal
