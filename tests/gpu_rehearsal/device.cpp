// The pretended GPU as torch sees a device: allocator, streams and events, generator, and the
// functions for torch_cuda.py.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>
#include <set>

#include "kernels.h"

namespace rehearsal {
namespace {

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return Device::get().allocate(bytes); }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

std::mutex pinned_mutex;
std::set<std::pair<const char*, const char*>> pinned;  // begins and ends

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto data = c10::GetCPUAllocator()->allocate(bytes);
    const auto* begin = static_cast<const char*>(data.get());
    std::lock_guard lock(pinned_mutex);
    pinned.emplace(begin, begin + bytes);
    auto* context = new std::pair(std::move(data), begin + bytes);
    auto release = [](void* p) {
      auto* held = static_cast<decltype(context)>(p);
      std::lock_guard lock(pinned_mutex);
      pinned.erase({static_cast<const char*>(held->first.get()), held->second});
      delete held;
    };
    return {context->first.get(), context, release, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

// A generator of the device, whose numbers one of the CPU makes.
struct DeviceGenerator final : c10::GeneratorImpl {
  explicit DeviceGenerator(at::Generator host)
      : GeneratorImpl(kCuda, c10::DispatchKeySet(c10::DispatchKey::CUDA)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return const_cast<at::Generator&>(host).seed(); }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(host.clone()); }
  at::Generator host;
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    static bool made = false;  // the first is the default one, which torch_cuda.py makes
    return std::exchange(made, true)
               ? at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator())
               : default_generator();
  }
  c10::Device getDeviceFromPtr(void*) const override { return kCuda; }
  c10::Allocator* getCUDADeviceAllocator() const override {
    return c10::GetAllocator(kCuda.type());
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  bool isPinnedPtr(const void* data) const override {
    const auto* place = static_cast<const char*>(data);
    std::lock_guard lock(pinned_mutex);
    auto after = pinned.lower_bound({place + 1, nullptr});
    return place && after != pinned.begin() && place < (--after)->second;
  }
  void deviceSynchronize(c10::DeviceIndex) const override {
    Device::get().host_wait("synchronize", true);
  }
};

struct Event {
  Clock clock;
  std::chrono::steady_clock::time_point time;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr auto static_type = c10::DeviceType::CUDA;
  static c10::Stream stream(StreamId id) { return c10::Stream(c10::Stream::UNSAFE, kCuda, id); }

  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return kCuda; }
  c10::Device getDevice() const override { return kCuda; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(Device::get().current()); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(kDefaultStream); }
  c10::Stream getNewStream(c10::Device, int) const override {
    return stream(Device::get().new_stream());
  }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    return stream(Device::get().new_stream());
  }
  c10::Stream exchangeStream(c10::Stream other) const override {
    return stream(Device::get().exchange(other.id()));
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  bool isStreamCapturing(const c10::Stream& other) const override {
    const auto before = Device::get().exchange(other.id());
    const bool found = Device::get().capturing() != nullptr;
    Device::get().exchange(before);
    return found;
  }
  void synchronizeStream(const c10::Stream& other) const override {
    Device::get().host_wait("synchronize a stream");
    Device::get().host_waits_for(Device::get().record_event(other.id()));
  }
  void synchronizeDevice(c10::DeviceIndex) const override {
    Device::get().host_wait("synchronize", true);
  }
  void record(void** event, const c10::Stream& on, c10::DeviceIndex,
              c10::EventFlag) const override {
    delete static_cast<Event*>(*event);
    *event = new Event{Device::get().record_event(on.id()), std::chrono::steady_clock::now()};
  }
  void block(void* event, const c10::Stream& other) const override {
    if (event) {
      Device::get().wait(other.id(), static_cast<Event*>(event)->clock);
    }
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void* event) const override {
    Device::get().host_wait("synchronize an event");
    if (event) {
      Device::get().host_waits_for(static_cast<Event*>(event)->clock);
    }
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    const auto passed = static_cast<Event*>(second)->time - static_cast<Event*>(first)->time;
    return std::chrono::duration<double, std::milli>(passed).count();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& other) const override {
    if (auto found = block_of(data)) {
      found->recorded.insert(other.id());
    }
  }
};

auto& graphs = *new std::map<int64_t, std::unique_ptr<Graph>>();
int64_t last_graph = 0;
auto& state_before = *new at::Tensor();  // of the generator, which recording does not move

// One text in answer, empty where all went well.
template <class Work>
const char* told(Work work) {
  static thread_local std::string text;
  text.clear();
  try {
    work();
  } catch (const c10::Error& error) {
    text = error.what_without_backtrace();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

}  // namespace

const at::Generator& default_generator() {
  static const auto made = at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator());
  return made;
}

at::Generator host_generator(const at::Generator& generator) {
  auto* found = dynamic_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl());
  TORCH_CHECK(found, "Expected a 'cuda' device type for generator but found '",
              generator.device().type(), "'");
  return found->host;
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace rehearsal

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, rehearsal::Hooks)  // torch asks for this name
}  // namespace at

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace rehearsal {

EXPORT void rehearsal_start() {
  static Allocator allocator;
  c10::SetAllocator(c10::DeviceType::CUDA, &allocator);
}

// Has an op of a library run by its kernel of the CPU, as if it had one for GPUs.
EXPORT void rehearsal_own_kernel(const char* library, const char* op) {
  struct Silent : c10::WarningHandler {  // that a kernel takes the place of Triton's
    void process(const c10::Warning&) override {}
  } silent;
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  static auto& made =
      *new std::vector<std::unique_ptr<torch::Library>>();  // they undo their registrations at
                                                            // their end
  made.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, library,
                                                  c10::DispatchKey::CUDA, __FILE__, __LINE__));
  made.back()->impl(op, torch::CppFunction::makeFromBoxedFunction<&launch>());
}

EXPORT int64_t rehearsal_new_graph() {
  graphs[++last_graph] = std::make_unique<Graph>();
  return last_graph;
}

EXPORT const char* rehearsal_begin(int64_t graph, int64_t pool) {
  return told([&] {
    state_before = default_generator().get_state().clone();
    graphs.at(graph)->pool = pool;
    Device::get().begin(graphs.at(graph).get());
  });
}

EXPORT const char* rehearsal_end(int64_t graph) {
  return told([&] {
    const_cast<at::Generator&>(default_generator()).set_state(state_before);
    Device::get().end(graphs.at(graph).get());
  });
}

EXPORT const char* rehearsal_replay(int64_t graph) {
  return told([&] { graphs.at(graph)->replay(); });
}

EXPORT void rehearsal_drop(int64_t graph) {
  const auto pool = graphs.at(graph)->pool;
  graphs.erase(graph);
  if (pool != kNoPool) {
    Device::get().forget(pool);
  }
}

EXPORT int64_t rehearsal_kernels(int64_t graph) {
  return int64_t(graphs.at(graph)->launches.size());
}
EXPORT int64_t rehearsal_waits() { return Device::get().waits; }
EXPORT void rehearsal_on_wait(void (*call)(const char*)) { Device::get().on_wait = call; }
EXPORT void rehearsal_sync_mode(int mode) { Device::get().sync_mode = mode; }
EXPORT int64_t rehearsal_allocated() { return int64_t(Device::get().allocated); }
EXPORT int64_t rehearsal_peak() { return int64_t(Device::get().peak); }
EXPORT void rehearsal_reset_peak() { Device::get().peak = Device::get().allocated; }
EXPORT const char* rehearsal_synchronize() {
  return told([&] { Device::get().host_wait("synchronize", true); });
}

// The oldest fault that was not asked for yet, or null.
EXPORT const char* rehearsal_fault() {
  static std::string text;
  auto& faults = Device::get().faults;
  if (faults.empty()) {
    return nullptr;
  }
  text = faults.front();
  faults.erase(faults.begin());
  return text.c_str();
}

}  // namespace rehearsal
