// The last pass over a result in float32, for one kind of vector. The includer defines
// FASTADV_LEVEL_INLINE and includes csrc/cpu/vector_avx512.h or vector_avx2.h first.
#pragma once

#include "cpu/conv_epilogue.h"

namespace fastadv::conv {
namespace {

FASTADV_LEVEL_INLINE vec::V read(const float* p, const vec::Live& live) {
  return vec::all(live) ? vec::load(p) : vec::load(p, live);
}

// Fetches the memory that `finish` will use at `at`, while the sums are computed. The processor
// does not foresee it where a grid has gaps, and large results lie beyond its nearer caches.
FASTADV_LEVEL_INLINE void fetch_ahead(const float* out, const EpilogueOf<float>& epilogue,
                                      int64_t at) {
  __builtin_prefetch(out + at, 1);
  if (epilogue.add) __builtin_prefetch(epilogue.add + at);
  if (epilogue.mask) __builtin_prefetch(epilogue.mask + at);
}

// As for bfloat16 in csrc/cpu/conv_inner.h.
FASTADV_LEVEL_INLINE void finish(float* out, vec::V value, const EpilogueOf<float>& epilogue,
                                 int64_t at, int64_t channel, const vec::Live& live) {
  if (epilogue.bias) value = vec::add(value, read(epilogue.bias + channel, live));
  if (epilogue.add) value = vec::add(value, read(epilogue.add + at, live));
  if (epilogue.relu) value = vec::at_least_zero(value);
  if (epilogue.mask) value = vec::where_positive(read(epilogue.mask + at, live), value);
  if (vec::all(live)) {
    vec::store(out + at, value);
  } else {
    vec::store(out + at, value, live);
  }
}

// `finish` for vectors of several places, whose first channel is `channel` of `channels`; place r
// has it at at[r]. Each step is asked for once for all of them, not once for each vector.
template <int rows, int vectors>
FASTADV_LEVEL_INLINE void finish_all(float* out, vec::V (&sum)[rows][vectors],
                                     const EpilogueOf<float> epilogue, const int64_t (&at)[rows],
                                     int64_t channel, int64_t channels) {
  using vec::kLanes;
  if (channel + vectors * kLanes > channels) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const int64_t first = n * kLanes, left = channels - channel - first;
      if (left <= 0) break;
      const vec::Live live = vec::live_lanes(left);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        finish(out, sum[r][n], epilogue, at[r] + first, channel + first, live);
      }
    }
    return;
  }
  if (epilogue.bias) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const vec::V bias = vec::load(epilogue.bias + channel + n * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) sum[r][n] = vec::add(sum[r][n], bias);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const int64_t place = at[r] + n * kLanes;
      vec::V& v = sum[r][n];
      if (epilogue.add) v = vec::add(v, vec::load(epilogue.add + place));
      if (epilogue.relu) v = vec::at_least_zero(v);
      if (epilogue.mask) v = vec::where_positive(vec::load(epilogue.mask + place), v);
      vec::store(out + place, v);
    }
  }
}

}  // namespace
}  // namespace fastadv::conv
