// Sums of rows by label: gradients of learned vectors.
#pragma once

#include "tensor.h"

namespace patchpack {

// Of each label the sum of its rows of `x`, `[B, R, C]` or `[R, C]` with contiguous channels:
// `[num_labels, C]`. `labels` are int32, one a row; rows of any other label are left out.
Tensor sum_rows(const Tensor& x, const Tensor& labels, int64_t num_labels);

}  // namespace patchpack
