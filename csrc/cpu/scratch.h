// Memory in which a kernel keeps what it needs between two passes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace fastadv {

constexpr std::align_val_t kScratchAlignment{64};  // a line of the caches, and a vector of AVX-512

struct FreeScratch {
  void operator()(void* memory) const { ::operator delete(memory, kScratchAlignment); }
};

// In builds with AddressSanitizer each call gets memory of exactly its size, full of NaN: an access
// past the end is seen, although an earlier call needed more, and so is a number that no one wrote.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kFreshScratch = true;
#else
constexpr bool kFreshScratch = false;
#endif

// Scratch memory of a thread, kept between calls: fresh memory costs a page fault every 4 KiB. The
// thread's next call may return the same memory.
inline void* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<void, FreeScratch> memory;
  thread_local int64_t size = 0;
  if (kFreshScratch || size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(::operator new(size_t(bytes), kScratchAlignment));
    size = bytes;
    if (kFreshScratch) std::memset(memory.get(), 0xff, size_t(bytes));
  }
  return memory.get();
}

}  // namespace fastadv
