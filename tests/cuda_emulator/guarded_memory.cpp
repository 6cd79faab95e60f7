// Memory of CPU tensors that ends at a page which nobody may touch: where a kernel reads or writes
// beyond a tensor, the process stops.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kMostGuarded = 1 << 20;  // to ask the system for more takes long
constexpr size_t kAlignment = 16;         // of the widest access of a kernel
constexpr unsigned char kFiller = 0xff;   // NaN in every float dtype

struct Block {
  unsigned char* pages;
  size_t size;         // with the guard page
  unsigned char* end;  // of the tensor
};

void release(void* context) {
  const Block* block = static_cast<Block*>(context);
  const unsigned char* guard = block->pages + block->size - getpagesize();
  for (const unsigned char* at = block->end; at < guard; ++at) {
    if (*at == kFiller) continue;
    fputs("written beyond the end of a tensor\n", stderr);
    abort();
  }
  munmap(block->pages, block->size);
  delete block;
}

struct GuardedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0 || size > kMostGuarded) return c10::GetDefaultCPUAllocator()->allocate(size);
    const size_t page = getpagesize(), room = (size + kAlignment - 1) / kAlignment * kAlignment;
    const size_t pages = (room + page - 1) / page * page;
    void* at =
        mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(at != MAP_FAILED, "no memory for ", size, " bytes");
    auto* const begin = static_cast<unsigned char*>(at) + pages - room;
    mprotect(static_cast<unsigned char*>(at) + pages, page, PROT_NONE);
    memset(begin + size, kFiller, room - size);
    auto* block = new Block{static_cast<unsigned char*>(at), pages + page, begin + size};
    return {begin, block, &release, c10::kCPU};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

const bool installed = [] {
  c10::SetCPUAllocator(new GuardedMemory, /*priority=*/255);
  return true;
}();

}  // namespace
