// Which samples of a batch an op is to work on.
#pragma once

#include <cstring>

#include "cpu/tensor.h"

namespace fastadv {

class Active {
 public:
  Active(const OptionalTensor& active, const at::Tensor& like)
      : values_(checked_active(active, like)) {}
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
