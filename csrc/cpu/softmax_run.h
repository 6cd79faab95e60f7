// The losses on logits over the rows of a batch. One file per storage type includes this one, as
// all kinds at all SIMD levels take the compiler long: softmax_losses_float.cpp and its siblings.
#pragma once

#include <c10/util/Exception.h>

#include <cstring>
#include <vector>

#include "cpu/softmax_kinds.h"
#include "cpu/softmax_losses.h"

namespace fastadv {
namespace {

// Reads a row into `to`, whose gradient is to go to `gradient`, which may be null.
template <class V, class T, class C = Element<V>>
FASTADV_INLINE Logits<C> load_row(C* to, const T* from, const C* gradient, int classes, int width) {
  constexpr int kStep = kLanesOf<V>;
  V most = V{} + kMinusInfinity<C>;
  int done = 0;
  if constexpr (std::is_same_v<T, C>) {
    for (; done + kStep <= classes; done += kStep) {
      const V v = lanes_at<V>(from + done);
      set_lanes<V>(to + done, v);
      most = larger(v, most);
    }
  }
  for (int i = done; i < classes; ++i) to[i] = load(from[i]);
  for (int i = classes; i < width; ++i) to[i] = kMinusInfinity<C>;
  for (; done < width; done += kStep) most = larger(lanes_at<V>(to + done), most);
  const auto larger_one = [](V a, V b) __attribute__((always_inline)) { return larger(a, b); };
  return {to,
          fold_lanes(most, larger_one),
          {reinterpret_cast<uintptr_t>(from + classes),
           reinterpret_cast<uintptr_t>(gradient ? gradient : to), sizeof(T), sizeof(C)}};
}

// `other` is null for the losses of one row of logits.
template <class Kind, class T, class V>
FASTADV_INLINE void compute_row(Row<V>& row, const T* logits, const T* other) {
  row.logits = load_row<V>(row.logits.at, logits, row.gradient, row.classes, row.width);
  if (!other) return Kind::row(row);
  row.other = load_row<V>(row.other.at, other, row.other_gradient, row.classes, row.width);
  Kind::row(row);
}

template <class C>
using Narrow = Vector<C, 32>;
using Wide = Vector<float, 64>;

template <class Kind, class T>
FASTADV_AVX512_ONLY void compute_wide_row(Row<Wide>& row, const T* logits, const T* other) {
  compute_row<Kind>(row, logits, other);
}

// The label of a sample; 0 where there are none.
int label(const int64_t* y, int64_t sample, int classes) {
  if (!y) return 0;
  TORCH_CHECK_INDEX(y[sample] >= 0 && y[sample] < classes, "y must lie in 0 .. ", classes - 1,
                    ", got ", y[sample], " at sample ", sample);
  return int(y[sample]);
}

// Row i of [B, C]; null where there is none. And the row after it.
template <class T, class Data>
T* row_of(Data* all, int64_t i, int classes) {
  return all ? static_cast<T*>(all) + i * classes : nullptr;
}

template <class T>
T* next_row(T* row, int classes) {
  return row ? row + classes : row;
}

template <class Kind, class T, class V>
void run_rows(const SoftmaxOperands& o, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int classes = o.classes;
  const int width = (classes + kRowLanes - 1) / kRowLanes * kRowLanes;
  std::vector<C> scratch(int64_t(2 + kScratchRows) * width);
  Row<V> row{.logits = {scratch.data()},
             .other = {scratch.data() + width},
             .scratch = scratch.data() + 2 * width,
             .classes = classes,
             .width = width,
             .weight = C(o.weight),
             .temperature = C(o.temperature),
             .gradient = row_of<C>(o.gradient, begin, classes),
             .other_gradient = row_of<C>(o.other_gradient, begin, classes),
             .gradient_scale = C(o.gradient_scale)};
  const T* logits = row_of<const T>(o.logits, begin, classes);
  const T* other = row_of<const T>(o.other, begin, classes);
  C* losses = static_cast<C*>(o.losses);
  for (int64_t i = begin; i < end; ++i) {
    row.y = label(o.y, i, classes);
    const auto compute = [&]() __attribute__((always_inline)) {
      compute_row<Kind>(row, logits, other);
    };
    if constexpr (std::is_same_v<V, Wide>) {
      compute_wide_row<Kind>(row, logits, other);
    } else if constexpr (std::is_same_v<C, double>) {
      at_simd_level(compute);
    } else {
      below_avx512(compute);  // the wide rows are for AVX-512
    }
    losses[i * o.losses_per_sample] = row.loss;
    if (o.losses_per_sample == 2) losses[2 * i + 1] = row.other_loss;
    logits = next_row(logits, classes);
    other = next_row(other, classes);
    row.gradient = next_row(row.gradient, classes);
    row.other_gradient = next_row(row.other_gradient, classes);
  }
}

template <class T, class Kind>
RunRows rows_of_kind() {
  if constexpr (!std::is_same_v<T, double>) {
    if (has_avx512()) return run_rows<Kind, T, Wide>;
  }
  return run_rows<Kind, T, Narrow<Compute<T>>>;
}

template <class T, class... Kinds>
RunRows rows_of_number(int number, KindList<Kinds...>) {
  constexpr RunRows (*kRows[])() = {rows_of_kind<T, Kinds>...};
  return kRows[number]();
}

}  // namespace

template <class T>
RunRows rows_of(int kind) {
  return rows_of_number<T>(kind, SoftmaxKinds{});
}

}  // namespace fastadv
