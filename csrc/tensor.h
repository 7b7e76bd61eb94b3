// Tensors at the boundary: the stable ABI of LibTorch, and what every op needs of it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace patchpack {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, bool pinned = false) {
  return torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, pinned);
}

// Contiguous, with the sizes and the dtype of `x`.
inline Tensor empty_of(const Tensor& x) {
  return empty({x.sizes().begin(), x.sizes().end()}, x.scalar_type());
}

// `x`, copied only if its last dimension is strided.
inline Tensor last_contiguous(const Tensor& x) {
  return x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

// `body(begin, end)` over parts of `[0, count)`, on torch's own threads. `cost` is the work of one
// item, about the number of elements it touches: little work stays on one thread.
template <typename Body>
void parallel_for(int64_t count, int64_t cost, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost));
  if (count > 0) torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace patchpack
