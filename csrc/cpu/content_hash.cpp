// Hashes of tensors' contents, by which the attack engine sees that no weight has changed. Schema:
// fastadv/engine/content.py.
#include <ATen/ops/empty.h>

#include <array>
#include <cstring>
#include <vector>

#include "cpu/tensor.h"

namespace fastadv {
namespace {

constexpr int64_t kChunk = int64_t(1) << 16;  // bytes of one task
constexpr int kLanes = 8;  // hashes side by side, so that no multiplication waits for another
constexpr uint64_t kFirst = 0x8b67e1d4a3c2f905, kSecond = 0x5d92f3ab7c10e46f;  // odd, random

// The state after one more word. The function is one-to-one in the state and in the word, so a
// single changed word always changes the hash.
uint64_t after(uint64_t state, uint64_t word, uint64_t factor) {
  state = (state ^ word) * factor;
  return state ^ (state >> 32);
}

uint64_t word(const char* bytes) {
  uint64_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

// The last block of a chunk is padded with 0; the number of bytes counts too.
uint64_t hash_chunk(const char* data, int64_t bytes, uint64_t seed) {
  constexpr int64_t kBlock = kLanes * sizeof(uint64_t);
  std::array<uint64_t, kLanes> lanes;
  for (int l = 0; l < kLanes; ++l) lanes[l] = after(seed, uint64_t(l), kSecond);
  const auto add_block = [&](const char* block) {
    for (int l = 0; l < kLanes; ++l) {
      lanes[l] = after(lanes[l], word(block + l * sizeof(uint64_t)), kFirst);
    }
  };
  int64_t done = 0;
  for (; done + kBlock <= bytes; done += kBlock) add_block(data + done);
  if (done < bytes) {
    char rest[kBlock] = {};
    std::memcpy(rest, data + done, bytes - done);
    add_block(rest);
  }
  uint64_t hash = uint64_t(bytes);
  for (uint64_t lane : lanes) hash = after(hash, lane, kSecond);
  return hash;
}

struct Task {
  const char* data;
  int64_t bytes;
  uint64_t seed;
};

at::Tensor content_hash(at::TensorList tensors) {
  std::vector<Task> tasks;
  std::vector<size_t> ends;
  for (const at::Tensor& t : tensors) {
    TORCH_CHECK_VALUE(
        t.device().is_cpu() && t.layout() == at::kStrided && t.is_non_overlapping_and_dense(),
        "tensors must be dense tensors on the CPU, got one of shape ", t.sizes(), " and strides ",
        t.strides(), " on ", t.device());
    const auto* data = static_cast<const char*>(t.const_data_ptr());
    const int64_t bytes = t.numel() * t.element_size();
    for (int64_t begin = 0; begin < bytes; begin += kChunk) {
      tasks.push_back({data + begin, std::min(kChunk, bytes - begin), uint64_t(begin)});
    }
    ends.push_back(tasks.size());
  }
  std::vector<uint64_t> hashes(tasks.size());
  at::parallel_for(0, int64_t(tasks.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      hashes[i] = hash_chunk(tasks[i].data, tasks[i].bytes, tasks[i].seed);
    }
  });
  at::Tensor result = at::empty({int64_t(ends.size())}, at::kLong);
  auto* to = result.mutable_data_ptr<int64_t>();
  size_t next = 0;
  for (size_t i = 0; i < ends.size(); ++i) {
    uint64_t hash = 0;
    for (; next < ends[i]; ++next) hash = after(hash, hashes[next], kSecond);
    to[i] = int64_t(hash);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CompositeExplicitAutograd, m) { m.impl("content_hash", &content_hash); }

}  // namespace fastadv
