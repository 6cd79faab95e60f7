// The part of an OpenMP runtime that the kernels use, on threads that ThreadSanitizer knows: it
// sees them begin and end, so that what a parallel region does is ordered before and after, and two
// threads within it are not. The real runtime is built without the sanitizer, and its barriers are
// unknown to it.
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace {

thread_local int number_of_this_thread = 0;
thread_local int threads_of_the_region = 1;

void enter(void (*body)(void*), void* data, int number, int threads) {
  const int outer_number = number_of_this_thread, outer_threads = threads_of_the_region;
  number_of_this_thread = number;
  threads_of_the_region = threads;
  body(data);
  number_of_this_thread = outer_number;
  threads_of_the_region = outer_threads;
}

}  // namespace

extern "C" {

int omp_get_thread_num() noexcept { return number_of_this_thread; }

int omp_get_num_threads() noexcept { return threads_of_the_region; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned wanted, unsigned) {
  const int threads = wanted ? int(wanted) : at::get_num_threads();
  std::vector<std::thread> others;
  for (int number = 1; number < threads; ++number)
    others.emplace_back(enter, body, data, number, threads);
  enter(body, data, 0, threads);
  for (auto& other : others) other.join();
}
}
