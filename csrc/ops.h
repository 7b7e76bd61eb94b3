// Every operator of `_C`, with the arguments of its schema in patchpack/ops/<op>.py.
#pragma once

#include "tensor.h"

namespace patchpack {

std::tuple<Tensor, Tensor> rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved,
                                bool inverse);
std::tuple<Tensor, Tensor> rope_2d(Tensor q, Tensor k, Tensor geometry, int64_t merge, double base,
                                   bool interleaved, std::string axes, bool inverse);
std::tuple<Tensor, Tensor> mrope(Tensor q, Tensor k, Tensor position_ids,
                                 std::vector<int64_t> sections, bool sections_interleaved,
                                 double base, bool inverse);

}  // namespace patchpack
