// Memory, streams and recordings of the pretended GPU: who has written and read which memory, on
// which stream.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace rehearsal {

using StreamId = int64_t;
constexpr StreamId kDefaultStream = 0;
constexpr int64_t kNoPool = 0;
constexpr int kPoison = 0xFF;  // NaN in every floating-point dtype, -1 in every integer

// For each stream the number of its kernels that are known to have ended.
using Clock = std::map<StreamId, int64_t>;

// One allocation. Its memory is gone when `data` is null.
struct Block {
  char* data = nullptr;
  size_t bytes = 0;
  bool live = false;  // whether a storage has it
  int64_t pool = kNoPool;
  StreamId stream = kDefaultStream;  // on which it was allocated, and may be handed out again
  Clock writes, reads;               // the last of each stream
  std::set<StreamId> recorded;       // streams that `record_stream` named
};
using BlockPtr = std::shared_ptr<Block>;

// The memory that a recording has touched.
struct Use {
  BlockPtr block;
  bool write;
  bool own;  // allocated by the recording, hence kept with its pool
};

struct Recording {
  int64_t pool = kNoPool;
  StreamId stream = kDefaultStream;
  std::string broken;                           // why it cannot be used
  std::set<BlockPtr> fresh;                     // allocated while it was made
  std::map<BlockPtr, std::vector<char>> saved;  // contents that recording must not change
};

class Device {
 public:
  static Device& get();

  // The streams. The current one belongs to the thread.
  StreamId current() const;
  StreamId exchange(StreamId stream);
  StreamId new_stream();
  Clock record_event(StreamId stream);
  void wait(StreamId stream, const Clock& event);
  void host_waits_for(const Clock& event);
  Clock all() const;  // everything that was launched

  // Memory.
  c10::DataPtr allocate(size_t bytes);
  void release(const BlockPtr& block);
  void access(const std::vector<Use>& uses,
              const std::string& name);  // of a kernel on the current stream

  // Recordings. All of a pool share its memory.
  void begin(Recording* recording);
  void end(Recording* recording);
  void forget(int64_t pool);
  void before_replay(int64_t pool);
  bool has_users(int64_t pool) const;
  Recording* capturing() const;  // on the current stream
  bool captures() const { return !captures_.empty(); }

  // The host waits for the device: an error while recording.
  void host_wait(const std::string& what, bool whole_device = false);
  [[noreturn]] void fault(const std::string& text);

  std::vector<std::string> faults;  // also those whose exception was caught
  int64_t waits = 0;
  int sync_mode = 0;  // of torch.cuda.set_sync_debug_mode: 0 default, 1 warn, 2 error
  void (*on_wait)(const char*) = nullptr;
  size_t allocated = 0, peak = 0;

 private:
  struct Freed {
    StreamId stream;
    Clock uses;
  };
  bool covered(StreamId stream, const Clock& event) const;
  BlockPtr found_in_pool(int64_t pool, size_t bytes);

  mutable std::recursive_mutex mutex_;
  StreamId streams_ = 0;
  std::map<StreamId, Clock> seen_;  // by each stream: what it has waited for
  Clock host_;
  std::map<StreamId, Recording*> captures_;
  std::map<int64_t, std::set<BlockPtr>> pools_;
  std::map<int64_t, int> users_;  // recordings of a pool
  std::vector<Freed> freed_;      // uses of freed memory that its own stream has not waited for
};

BlockPtr block_of(const c10::DataPtr& data);

}  // namespace rehearsal
