#include "memory.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace rehearsal {
namespace {

thread_local StreamId current_stream = kDefaultStream;

void merge(Clock& into, const Clock& other) {
  for (const auto& [stream, tick] : other) {
    into[stream] = std::max(into[stream], tick);
  }
}

void release_context(void* context) {
  auto* block = static_cast<BlockPtr*>(context);
  Device::get().release(*block);
  delete block;
}

void drop(const BlockPtr& block) {
  std::free(block->data);
  block->data = nullptr;
}

}  // namespace

Device& Device::get() {
  static auto* device = new Device();  // tensors outlive static objects
  return *device;
}

StreamId Device::current() const { return current_stream; }

StreamId Device::exchange(StreamId stream) { return std::exchange(current_stream, stream); }

StreamId Device::new_stream() {
  std::lock_guard lock(mutex_);
  return ++streams_;
}

Clock Device::record_event(StreamId stream) {
  std::lock_guard lock(mutex_);
  return seen_[stream];
}

void Device::wait(StreamId stream, const Clock& event) {
  std::lock_guard lock(mutex_);
  merge(seen_[stream], event);
}

void Device::host_waits_for(const Clock& event) {
  std::lock_guard lock(mutex_);
  merge(host_, event);
}

Clock Device::all() const {
  std::lock_guard lock(mutex_);
  Clock found;
  for (const auto& [stream, clock] : seen_) {
    merge(found, clock);
  }
  return found;
}

bool Device::covered(StreamId stream, const Clock& event) const {
  const auto own = seen_.find(stream);
  for (const auto& [other, tick] : event) {
    const auto by_host = host_.find(other);
    if (other == stream || (by_host != host_.end() && by_host->second >= tick)) {
      continue;
    }
    if (own == seen_.end()) {
      return false;
    }
    const auto found = own->second.find(other);
    if (found == own->second.end() || found->second < tick) {
      return false;
    }
  }
  return true;
}

c10::DataPtr Device::allocate(size_t bytes) {
  std::lock_guard lock(mutex_);
  const c10::Device device(c10::DeviceType::CUDA, 0);
  if (bytes == 0) {
    return {nullptr, device};
  }
  const auto stream = current();
  // The allocator of a GPU may hand out any memory that was freed on this stream.
  std::erase_if(freed_, [&](const Freed& f) { return covered(f.stream, f.uses); });
  for (const auto& freed : freed_) {
    if (freed.stream == stream) {
      const auto other = freed.uses.begin()->first;
      freed_.clear();
      fault("memory of stream " + std::to_string(stream) + " was freed while stream " +
            std::to_string(other) + " may still use it, and is handed out again");
    }
  }
  auto* recording = capturing();
  BlockPtr block = recording ? found_in_pool(recording->pool, bytes) : nullptr;
  if (!block) {
    block = std::make_shared<Block>();
    block->bytes = bytes;
    block->data = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    std::memset(block->data, kPoison, bytes);
  }
  block->live = true;
  block->stream = stream;
  if (recording) {
    block->pool = recording->pool;
    pools_[recording->pool].insert(block);
    recording->fresh.insert(block);
  }
  allocated += block->bytes;
  peak = std::max(peak, allocated);
  return {block->data, new BlockPtr(block), &release_context, device};
}

BlockPtr Device::found_in_pool(int64_t pool, size_t bytes) {
  BlockPtr best;
  for (const auto& block : pools_[pool]) {
    if (!block->live && block->bytes >= bytes && block->bytes <= 2 * bytes &&
        (!best || block->bytes < best->bytes)) {
      best = block;
    }
  }
  return best;
}

void Device::release(const BlockPtr& block) {
  std::lock_guard lock(mutex_);
  block->live = false;
  allocated -= block->bytes;
  Clock uses = block->writes;
  merge(uses, block->reads);
  std::erase_if(uses, [&](const auto& use) { return block->recorded.contains(use.first); });
  if (!covered(block->stream, uses)) {
    std::erase_if(uses, [&](const auto& use) { return covered(block->stream, {use}); });
    freed_.push_back({block->stream, uses});
  }
  block->recorded.clear();
  if (block->pool == kNoPool) {
    drop(block);
  } else if (!has_users(block->pool)) {
    pools_[block->pool].erase(block);
    drop(block);
  }
}

void Device::access(const std::vector<Use>& uses, const std::string& name) {
  std::lock_guard lock(mutex_);
  const auto stream = current();
  auto* recording = capturing();
  if (!recording && captures()) {
    const auto text =
        name + " runs on stream " + std::to_string(stream) + " while another stream records";
    if (stream == kDefaultStream) {
      captures_.begin()->second->broken = text;
      TORCH_CHECK(
          false,
          "CUDA error: operation would make the legacy stream depend on a capturing stream: ",
          text);
    }
  }
  if (recording) {  // no kernel runs, but this device runs it for the shapes of its results
    for (const auto& use : uses) {
      auto& block = *use.block;
      if (use.write && !recording->fresh.contains(use.block) &&
          !recording->saved.contains(use.block)) {
        recording->saved[use.block] = {block.data, block.data + block.bytes};
      }
    }
    return;
  }
  auto& seen = seen_[stream];
  merge(seen, host_);
  const auto tick = ++seen[stream];
  for (const auto& use : uses) {
    auto& block = *use.block;
    const bool ordered =
        covered(stream, block.writes) && (!use.write || covered(stream, block.reads));
    if (!ordered) {
      fault(name + (use.write ? " writes" : " reads") + " on stream " + std::to_string(stream) +
            " memory that another stream may still use, and has not waited for it");
    }
    if (use.write) {
      block.writes = {{stream, tick}};
      block.reads.clear();
    } else {
      block.reads[stream] = tick;
    }
  }
}

Recording* Device::capturing() const {
  std::lock_guard lock(mutex_);
  const auto found = captures_.find(current());
  return found == captures_.end() ? nullptr : found->second;
}

void Device::begin(Recording* recording) {
  std::lock_guard lock(mutex_);
  TORCH_CHECK(current() != kDefaultStream, "CUDA graphs must be captured on a non-default stream");
  TORCH_CHECK(captures_.empty(), "CUDA error: operation not permitted: another stream records");
  recording->stream = current();
  const auto& blocks = pools_[recording->pool];
  const bool used =
      std::any_of(blocks.begin(), blocks.end(), [](const auto& block) { return block->live; });
  const auto users = users_.find(recording->pool);
  TORCH_CHECK(users == users_.end() || users->second > 0 || !used,
              "use_count > 0 INTERNAL ASSERT FAILED");
  ++users_[recording->pool];
  captures_[recording->stream] = recording;
}

void Device::end(Recording* recording) {
  std::lock_guard lock(mutex_);
  captures_.erase(recording->stream);
  // Recording computes nothing: memory has its old contents, and new memory has no values.
  for (const auto& [block, bytes] : recording->saved) {
    if (block->data) {
      std::memcpy(block->data, bytes.data(), bytes.size());
    }
  }
  for (const auto& block : recording->fresh) {
    std::memset(block->data, kPoison, block->bytes);
  }
  recording->saved.clear();
  TORCH_CHECK(
      recording->broken.empty(),
      "CUDA error: operation failed due to a previous error during capture: ", recording->broken);
}

bool Device::has_users(int64_t pool) const {
  std::lock_guard lock(mutex_);
  const auto found = users_.find(pool);
  return found != users_.end() && found->second > 0;
}

void Device::forget(int64_t pool) {
  std::lock_guard lock(mutex_);
  if (--users_[pool] > 0) {
    return;
  }
  std::erase_if(pools_[pool], [](const BlockPtr& block) {
    if (!block->live) {
      drop(block);
    }
    return !block->live;
  });
}

void Device::before_replay(int64_t pool) {
  std::lock_guard lock(mutex_);
  for (const auto& block : pools_[pool]) {
    if (!block->live) {  // other recordings of the pool may have written there
      std::memset(block->data, kPoison, block->bytes);
    }
  }
}

void Device::host_wait(const std::string& what, bool whole_device) {
  {
    std::lock_guard lock(mutex_);
    auto* recording = capturing();
    if (!recording && whole_device && captures()) {
      recording = captures_.begin()->second;
    }
    if (recording) {
      recording->broken = what;
      TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing: ", what);
    }
    ++waits;
    host_waits_for(whole_device ? all() : record_event(current()));
  }
  if (on_wait) {
    on_wait(what.c_str());
  }
  TORCH_CHECK(sync_mode < 2, "called a synchronizing CUDA operation: ", what);
}

void Device::fault(const std::string& text) {
  std::lock_guard lock(mutex_);
  faults.push_back(text);
  TORCH_CHECK(false, "GPU rehearsal: ", text);
}

BlockPtr block_of(const c10::DataPtr& data) {
  if (data.get_deleter() != &release_context) {
    return nullptr;
  }
  return *static_cast<BlockPtr*>(data.get_context());
}

}  // namespace rehearsal
