// Rows of a batch `[B, R, C]`, or of one matrix `[R, C]`, whose last dimension is contiguous.
#pragma once

#include "tensor.h"

namespace patchpack {

// Rows are counted on through the batch.
struct Rows {
  const char* data;
  int64_t num_channels, num_bytes;  // of a row
  int64_t rows_in_batch, stride_batch, stride_row;  // strides in bytes

  explicit Rows(const Tensor& x) {
    const int64_t last = x.dim() - 1, size = (int64_t)x.element_size();
    data = (const char*)x.const_data_ptr();
    num_channels = x.size(last);
    num_bytes = num_channels * size;
    stride_row = x.stride(last - 1) * size;
    rows_in_batch = std::max<int64_t>(x.size(last - 1), 1);
    stride_batch = last == 2 ? x.stride(0) * size : 0;
    if (last == 1 || x.size(0) == 1 || stride_batch == rows_in_batch * stride_row)
      rows_in_batch = INT64_MAX;  // they follow each other
  }

  const char* at(int64_t row) const {
    if (row < rows_in_batch) return data + row * stride_row;
    return data + row / rows_in_batch * stride_batch + row % rows_in_batch * stride_row;
  }
};

}  // namespace patchpack
