// Index tensors, int32 or int64, as int64.
#pragma once

#include "tensor.h"

namespace patchpack {

inline Tensor all_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// The elements of a contiguous tensor, which has to outlive them.
struct Integers {
  const void* values;
  bool is_long;

  explicit Integers(const Tensor& x)
      : values(x.const_data_ptr()), is_long(x.scalar_type() == ScalarType::Long) {}

  int64_t operator[](int64_t i) const {
    return is_long ? ((const int64_t*)values)[i] : ((const int32_t*)values)[i];
  }
};

}  // namespace patchpack
