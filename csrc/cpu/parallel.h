// at::parallel_for on the OpenMP runtime that torch has loaded, from any compiler.
//
// torch's header writes an OpenMP pragma. GCC compiles that to calls of libgomp, which the runtimes
// of GCC, Clang and Intel all answer. Clang compiles it to calls of libomp, which torch's libgomp
// does not have, and a second runtime would start a second pool of threads. So the parallel region
// is entered by libgomp's function here, and no compiler needs an OpenMP option. The build defines
// INTRA_OP_PARALLEL, without which torch's header would run everything on one thread; a file that
// includes torch's header and not this one does not compile.
#pragma once

#ifndef INTRA_OP_PARALLEL
#error "The build must define INTRA_OP_PARALLEL."
#endif

#include <cstdint>

namespace at::internal {
template <class F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f);
}  // namespace at::internal

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads() noexcept;
int omp_get_thread_num() noexcept;
}

namespace at::internal {

// The parallel part of at::parallel_for: each thread takes one run of [begin, end), of `grain_size`
// at least.
template <class F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  struct Region {
    int64_t begin, end, grain_size;
    const F& f;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;

    void run() noexcept {
      int64_t threads = omp_get_num_threads();
      if (grain_size > 0) threads = std::min(threads, divup(end - begin, grain_size));
      const int thread = omp_get_thread_num();
      const int64_t size = divup(end - begin, threads), first = begin + thread * size;
      if (first >= end) return;
      try {
        const ThreadIdGuard guard(thread);
        f(first, std::min(end, first + size));
      } catch (...) {  // must not leave the region
        if (!failed.test_and_set()) error = std::current_exception();
      }
    }
  } region{begin, end, grain_size, f};
  GOMP_parallel([](void* data) { static_cast<Region*>(data)->run(); }, &region, 0, 0);
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace at::internal
