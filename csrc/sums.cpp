#include "sums.h"

#include "rows.h"

namespace patchpack {
namespace {

constexpr int64_t kSumChannels = 256;  // that are summed at once

struct LabelledRows {
  Rows x;
  ScalarType dtype;
  void* out;
  std::vector<int64_t> rows, begins;  // those of a label follow each other, from its begin on
  int64_t num_blocks;                 // of channels
};

}  // namespace
}  // namespace patchpack

#define KERNELS "sums_kernels.h"
#include "foreach_level.h"

namespace patchpack {

Tensor sum_rows(const Tensor& x, const Tensor& labels_tensor, int64_t num_labels) {
  const int64_t num_channels = x.size(x.dim() - 1), num_rows = labels_tensor.size(0);
  const Tensor out = empty({num_labels, num_channels}, x.scalar_type());
  if (num_labels == 0) return out;
  const int32_t* labels = labels_tensor.const_data_ptr<int32_t>();
  const auto counts = [&](int64_t row) { return labels[row] >= 0 && labels[row] < num_labels; };

  std::vector<int64_t> begins(num_labels + 1);
  for (int64_t row = 0; row < num_rows; ++row)
    if (counts(row)) ++begins[labels[row] + 1];
  for (int64_t label = 0; label < num_labels; ++label) begins[label + 1] += begins[label];
  std::vector<int64_t> rows(begins[num_labels]), next = begins;
  for (int64_t row = 0; row < num_rows; ++row)
    if (counts(row)) rows[next[labels[row]]++] = row;

  const int64_t num_blocks = (num_channels + kSumChannels - 1) / kSumChannels;
  const int64_t cost = (int64_t)rows.size() / num_labels * kSumChannels;
  const LabelledRows r{Rows(x), x.scalar_type(), out.mutable_data_ptr(), std::move(rows),
                       std::move(begins), num_blocks};
  parallel_for(num_labels * num_blocks, cost, [&](int64_t begin, int64_t end) {
    AT_LEVEL(sum_rows(r, begin, end));
  });
  return out;
}

}  // namespace patchpack
