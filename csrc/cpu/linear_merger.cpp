// The linear merger on the CPU. Definition: fastadv/ops/linear_merger.py.
//
// BLAS computes the products, called through ATen, on column slices of the weight: for matrices of
// this size it is faster than code written here would be. But with several threads BLAS sums in an
// order that depends on their number. So the work is cut into tiles of fixed size, and each tile is
// computed by one thread: within a parallel region BLAS uses only the thread that calls it.
//
// Half precision is converted to float32 first, because BLAS would round to half precision after
// each of the features. The parts are added up in one float32 result, which is rounded once.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <vector>

#include "cpu/tensor.h"

namespace fastadv {
namespace {

// A tile's rows and columns: of a size at which BLAS is near its best on one thread.
constexpr int64_t kRows = 64, kColumns = 256;

using Tensors = std::vector<at::Tensor>;

int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

at::Tensor tile(const at::Tensor& t, int64_t axis, int64_t index, int64_t size) {
  return t.slice(axis, index * size, std::min((index + 1) * size, t.size(axis)));
}

// Runs f(task) on one thread each. Never fewer than two tasks: a single one would run outside a
// parallel region, where BLAS takes every thread there is.
template <class F>
void parallel_tasks(int64_t tasks, const F& f) {
  if (tasks == 0) return;
  at::parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
    // The guard holds for one thread only, and arguments may require grad.
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t task = begin; task < std::min(end, tasks); ++task) f(task);
  });
}

at::ScalarType compute_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor widened(const at::Tensor& t) { return t.to(compute_dtype(t)).contiguous(); }

at::Tensor empty(int64_t rows, int64_t columns, const at::Tensor& like) {
  return at::empty({rows, columns},
                   like.options().dtype(compute_dtype(like)).memory_format(std::nullopt));
}

void check_matrix(const at::Tensor& t, const char* name, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.dim() == 2, name, " must have two axes, got shape ", t.sizes());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must have the dtype ",
                   like.scalar_type(), ", got ", t.scalar_type());
  dispatch_float(t.scalar_type(), name, [](auto) {});
}

// The features in the dtype of computation; each of them [rows, d].
Tensors checked_features(at::TensorList features, const at::Tensor& like, int64_t rows) {
  Tensors parts;
  for (const at::Tensor& part : features) {
    check_matrix(part, "features", like);
    TORCH_CHECK_VALUE(part.size(0) == rows, "features must have ", rows, " rows, got shape ",
                      part.sizes());
    parts.push_back(widened(part));
  }
  return parts;
}

// The columns of t that belong to each width, as views.
Tensors columns_of(const at::Tensor& t, at::IntArrayRef widths, const char* name) {
  Tensors columns;
  int64_t start = 0;
  for (const int64_t width : widths) {
    columns.push_back(t.slice(1, start, start + width));
    start += width;
  }
  TORCH_CHECK_VALUE(start == t.size(1), name, " must have ", start, " columns, got ", t.size(1));
  return columns;
}

std::vector<int64_t> widths_of(const Tensors& parts) {
  std::vector<int64_t> widths;
  for (const at::Tensor& part : parts) widths.push_back(part.size(1));
  return widths;
}

at::Tensor linear_merger(at::TensorList features, const at::Tensor& weight,
                         const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(!features.empty(), "features must hold at least one tensor, got none");
  check_matrix(weight, "weight", weight);
  const int64_t batch = features[0].size(0), classes = weight.size(0);
  const Tensors parts = checked_features(features, weight, batch);
  const Tensors columns = columns_of(widened(weight), widths_of(parts), "weight");
  at::Tensor start;
  if (bias) {
    TORCH_CHECK_VALUE(bias->sizes() == at::IntArrayRef{classes}, "bias must have shape [", classes,
                      "], got ", bias->sizes());
    start = bias->to(compute_dtype(weight)).expand({batch, classes});
  }
  const at::Tensor out = empty(batch, classes, weight);
  const int64_t across = tiles_of(classes, kColumns);
  parallel_tasks(tiles_of(batch, kRows) * across, [&](int64_t task) {
    const int64_t row = task / across, column = task % across;
    const auto of_task = [&](const at::Tensor& t) {
      return tile(tile(t, 0, row, kRows), 1, column, kColumns);
    };
    at::Tensor to = of_task(out);
    for (size_t i = 0; i < parts.size(); ++i) {
      const at::Tensor a = tile(parts[i], 0, row, kRows);
      const at::Tensor b = tile(columns[i], 0, column, kColumns).t();
      if (i == 0 && !start.defined()) {
        at::mm_out(to, a, b);
      } else {
        at::addmm_out(to, i == 0 ? of_task(start) : to, a, b);
      }
    }
  });
  return out.to(weight.scalar_type());
}

std::vector<at::Tensor> linear_merger_backward_features(const at::Tensor& grad,
                                                        const at::Tensor& weight,
                                                        at::IntArrayRef widths,
                                                        const c10::List<bool>& wanted) {
  check_matrix(weight, "weight", weight);
  check_matrix(grad, "grad", weight);
  TORCH_CHECK_VALUE(grad.size(1) == weight.size(0), "grad must have ", weight.size(0),
                    " columns, got ", grad.size(1));
  TORCH_CHECK_VALUE(wanted.size() == widths.size(), "wanted must have ", widths.size(),
                    " entries, got ", wanted.size());
  const at::Tensor slope = widened(grad);
  const Tensors all = columns_of(widened(weight), widths, "weight");
  Tensors columns, found;
  for (size_t i = 0; i < all.size(); ++i) {
    if (!wanted[i]) continue;
    columns.push_back(all[i]);
    found.push_back(empty(grad.size(0), widths[i], weight));
  }
  const int64_t down = tiles_of(grad.size(0), kRows);
  parallel_tasks(int64_t(found.size()) * down, [&](int64_t task) {
    const int64_t part = task / down, row = task % down;
    at::Tensor to = tile(found[part], 0, row, kRows);
    at::mm_out(to, tile(slope, 0, row, kRows), columns[part]);
  });
  for (at::Tensor& t : found) t = t.to(weight.scalar_type());
  return found;
}

// One tile of the weight's gradient: rows and columns of one of the features.
struct WeightTile {
  at::Tensor to, slope, part;
};

at::Tensor linear_merger_backward_weight(const at::Tensor& grad, at::TensorList features) {
  check_matrix(grad, "grad", grad);
  const Tensors parts = checked_features(features, grad, grad.size(0));
  const at::Tensor slope = widened(grad).t();  // [C, B]
  const std::vector<int64_t> widths = widths_of(parts);
  int64_t total = 0;
  for (const int64_t width : widths) total += width;
  const at::Tensor found = empty(grad.size(1), total, grad);
  const Tensors columns = columns_of(found, widths, "features");
  std::vector<WeightTile> tiles;
  for (size_t i = 0; i < parts.size(); ++i) {
    for (int64_t c = 0; c < tiles_of(widths[i], kColumns); ++c) {
      for (int64_t r = 0; r < tiles_of(grad.size(1), kColumns); ++r) {
        tiles.push_back({tile(tile(columns[i], 1, c, kColumns), 0, r, kColumns),
                         tile(slope, 0, r, kColumns), tile(parts[i], 1, c, kColumns)});
      }
    }
  }
  parallel_tasks(int64_t(tiles.size()),
                 [&](int64_t i) { at::mm_out(tiles[i].to, tiles[i].slope, tiles[i].part); });
  return found.to(grad.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, CPU, m) {
  m.impl("linear_merger", &linear_merger);
  m.impl("linear_merger_backward_features", &linear_merger_backward_features);
  m.impl("linear_merger_backward_weight", &linear_merger_backward_weight);
}

}  // namespace fastadv
