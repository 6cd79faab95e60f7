// Stores that bypass the caches, for results larger than the caches.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace fastadv {

// Results of at least this many bytes bypass the caches: an ordinary store first reads the line it
// overwrites, and so large a result does not stay in a cache for its next reader.
constexpr int64_t kStreamedBytes = 16 << 20;

#ifdef __SSE2__
constexpr int64_t kStreamWidth = 16;

inline void stream_block(void* to, const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kStreamWidth) {
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(static_cast<char*>(to) + i),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + i)));
  }
}
#endif

// Writes N arrays of n elements, all as far from a 16-byte boundary as the first;
// fill(to, first, count) writes the elements from `first` on to the addresses in `to`.
template <size_t N, class T, class F>
void write_blocks(const std::array<T*, N>& out, int64_t n, bool streamed, const F& fill) {
#ifdef __SSE2__
  // A few lines at a time: in longer runs the memory waits for the stores, then for the loads.
  constexpr int64_t kBlock = 256 / sizeof(T);
  const int64_t off = int64_t(reinterpret_cast<uintptr_t>(out[0]) % kStreamWidth);
  const int64_t head = std::min<int64_t>(n, (kStreamWidth - off) % kStreamWidth / sizeof(T));
  const int64_t blocks = streamed ? (n - head) / kBlock : 0;
  if (blocks > 0) {
    alignas(64) T buffer[N][kBlock];
    std::array<T*, N> to = out, buffers;
    for (size_t k = 0; k < N; ++k) buffers[k] = buffer[k];
    fill(to, 0, head);
    for (int64_t at = head; at < head + blocks * kBlock; at += kBlock) {
      fill(buffers, at, kBlock);
      for (size_t k = 0; k < N; ++k) stream_block(out[k] + at, buffer[k], sizeof(buffer[k]));
    }
    const int64_t tail = head + blocks * kBlock;
    for (size_t k = 0; k < N; ++k) to[k] += tail;
    fill(to, tail, n - tail);
    _mm_sfence();
    return;
  }
#else
  (void)streamed;
#endif
  fill(out, 0, n);
}

}  // namespace fastadv
