// Runs CUDA kernels on the CPU, the threads of a block as fibres of one thread.
//
// Blocks run one after the other, in random order. Within a block the warps follow each other in
// random order, each as far as the next barrier: a warp that needs another's result meets either
// all of it or nothing, and one that overtakes another does so by as much as the barriers allow.
// Within a warp the lanes go in random order from one shuffle to the next.
#include "emulator.h"

#include <c10/util/Exception.h>  // torch's other headers take ten seconds
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulator {
namespace {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 256 << 10;

enum class State { kReady, kAtBarrier, kAtShuffle, kEnded };

// A fibre is one thread of a block after the other. The first switch to it goes by ucontext, the
// others by setjmp, which costs no system call.
struct Fibre {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf paused;
  bool started = false;
  State state = State::kReady;
  unsigned shuffles = 0;
};

std::vector<std::unique_ptr<Fibre>> fibres;
Fibre* current;
jmp_buf scheduler;
const std::function<void()>* thread_of_grid;
std::string fault;  // of a kernel, found on a fibre
std::mt19937 random_order;
std::set<std::string> launched_kernels;

// The values of a shuffle. The next one takes the other half, as slower lanes may still read.
alignas(16) char of_lane[2][kWarp][16];

void pause_in(State state) {
  current->state = state;
  if (!_setjmp(current->paused)) _longjmp(scheduler, 1);
}

void live() {
  while (true) {
    (*thread_of_grid)();
    pause_in(State::kEnded);
  }
}

void resume(Fibre& fibre) {
  current = &fibre;
  if (_setjmp(scheduler)) return;
  if (fibre.started) _longjmp(fibre.paused, 1);
  fibre.started = true;
  getcontext(&fibre.start);
  fibre.start.uc_stack.ss_sp = fibre.stack.get();
  fibre.start.uc_stack.ss_size = kStack;
  makecontext(&fibre.start, live, 0);
  setcontext(&fibre.start);
}

template <class... Text>
void check(bool good, const char* kernel, const Text&... text) {
  if (good) return;
  const std::string message = c10::str("kernel ", kernel, ", block ", blockIdx.x, ": ", text...);
  fibres.clear();  // they stand in the midst of the kernel
  fault.clear();
  TORCH_CHECK(false, message);
}

// Runs a warp until all its lanes are at a barrier or at their end.
void run_warp(const char* kernel, int warp) {
  int lanes[kWarp];
  std::iota(lanes, lanes + kWarp, 0);
  while (true) {
    std::shuffle(lanes, lanes + kWarp, random_order);
    int waiting = 0;
    for (const int lane : lanes) {
      Fibre& fibre = *fibres[warp * kWarp + lane];
      if (fibre.state == State::kReady) {
        threadIdx.x = warp * kWarp + lane;
        resume(fibre);
        check(fault.empty(), kernel, fault);
      }
      waiting += fibre.state == State::kAtShuffle;
    }
    if (waiting == 0) return;
    check(waiting == kWarp, kernel, waiting, " of 32 lanes of warp ", warp, " are in a shuffle");
    for (const int lane : lanes) fibres[warp * kWarp + lane]->state = State::kReady;
  }
}

void run_block(const char* kernel, int threads) {
  for (int i = 0; i < threads; ++i) fibres[i]->state = State::kReady;
  std::vector<int> warps(threads / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  while (true) {
    std::shuffle(warps.begin(), warps.end(), random_order);
    for (const int warp : warps) run_warp(kernel, warp);
    int ended = 0;
    for (int i = 0; i < threads; ++i) ended += fibres[i]->state == State::kEnded;
    if (ended == threads) return;
    check(ended == 0, kernel, ended, " of ", threads,
          " threads ended, the others are at a barrier");
    for (int i = 0; i < threads; ++i) fibres[i]->state = State::kReady;
  }
}

}  // namespace

void run_grid(const char* kernel, int64_t blocks, int64_t threads,
              const std::function<void()>& thread) {
  check(blocks > 0 && blocks <= INT32_MAX, kernel, "grid of ", blocks, " blocks");
  check(threads > 0 && threads <= kMostThreads && threads % kWarp == 0, kernel, "block of ",
        threads, " threads");
  launched_kernels.insert(kernel);
  while (int64_t(fibres.size()) < threads) fibres.push_back(std::make_unique<Fibre>());
  thread_of_grid = &thread;
  gridDim = dim3(unsigned(blocks));
  blockDim = dim3(unsigned(threads));
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_order);
  for (const unsigned block : order) {
    blockIdx.x = block;
    run_block(kernel, int(threads));
  }
}

void exchange(unsigned mask, void* value, size_t size, int (*lane_of)(int lane, int distance),
              int distance) {
  if (mask != 0xffffffff || distance <= 0 || distance >= kWarp) {
    fault = "a shuffle of other lanes than all, or over a distance that is not in 1 .. 31";
    pause_in(State::kEnded);
  }
  const int lane = int(threadIdx.x % kWarp);
  auto& values = of_lane[current->shuffles++ % 2];
  memcpy(values[lane], value, size);
  pause_in(State::kAtShuffle);
  memcpy(value, values[lane_of(lane, distance)], size);
}

}  // namespace cuda_emulator

// For plugin.py, by way of ctypes.
extern "C" {

[[gnu::visibility("default")]] void cuda_emulator_seed(unsigned value) {
  cuda_emulator::random_order.seed(value);
}

// The kernels launched so far, with ", " between them.
[[gnu::visibility("default")]] const char* cuda_emulator_launched() {
  static std::string text;
  text.clear();
  for (const std::string& kernel : cuda_emulator::launched_kernels) {
    text += (text.empty() ? "" : ", ") + kernel;
  }
  return text.c_str();
}

}  // extern "C"

void __syncthreads() { cuda_emulator::pause_in(cuda_emulator::State::kAtBarrier); }

cudaError_t cudaGetLastError() { return cudaSuccess; }
