// Memory in which a kernel keeps what it needs between two passes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fastadv {

// Scratch memory of a thread, kept between calls: fresh memory costs a page fault every 4 KiB.
inline void* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<std::byte[]> memory;
  thread_local int64_t size = 0;
  if (size < bytes + 64) {
    memory.reset(new std::byte[bytes + 64]);
    size = bytes + 64;
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}

}  // namespace fastadv
