// Which samples of a batch an op is to work on.
#pragma once

#include <cstring>

#include "cpu/tensor.h"

namespace fastadv {

class Active {
 public:
  Active(const OptionalTensor& active, int64_t batch) {
    if (!active) return;
    TORCH_CHECK_TYPE(active->scalar_type() == at::kBool, "active must be a bool tensor, got ",
                     active->scalar_type());
    TORCH_CHECK_VALUE(active->sizes() == at::IntArrayRef{batch}, "active must have shape [", batch,
                      "], got ", active->sizes());
    TORCH_CHECK_VALUE(active->device().is_cpu(), "active must be on the CPU, got ",
                      active->device());
    values_ = active->contiguous();
  }
  bool all() const { return !values_.defined(); }
  bool operator[](int64_t sample) const { return all() || values_.const_data_ptr<bool>()[sample]; }

 private:
  at::Tensor values_;
};

// What is done to a sample that is not active: nothing, where an op works in place.
template <class T>
void copy_elements(T* to, const T* from, int64_t count) {
  if (to != from) std::memcpy(to, from, size_t(count) * sizeof(T));
}

}  // namespace fastadv
