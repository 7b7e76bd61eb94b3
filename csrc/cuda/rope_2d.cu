// Rotary position embedding by row and column; the maths is in patchpack.reference.rope_2d.
#include "../grid.h"
#include "rotary.cuh"

namespace patchpack {

// Row and column of a token of packed images.
struct GridPlaces {
  Geometry geometry;
  int32_t merge;

  HOST_DEVICE Place operator()(int64_t token) const {
    const int64_t grid = geometry.find(token);
    const int32_t height = geometry.height(grid), width = geometry.width(grid);
    const int32_t in_frame = (int32_t)(token - geometry.first(grid)) % (height * width);
    const Cell cell = token_to_cell(in_frame, width, merge);
    return {(int32_t)cell.row, (int32_t)cell.col, 0};
  }
};

std::tuple<Tensor, Tensor> rope_2d(Tensor q, Tensor k, Tensor geometry, int64_t merge, double base,
                                   bool interleaved, std::string axes, bool inverse) {
  const GridPlaces places{{geometry.const_data_ptr<int64_t>(), geometry.size(0) - 1},
                          (int32_t)merge};
  const auto& frequencies = frequencies_2d(q.size(2) / 2, base, axes);
  return interleaved ? rotate<true>(q, k, places, frequencies, inverse)
                     : rotate<false>(q, k, places, frequencies, inverse);
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, PATCHPACK_DEVICE, library) {
  library.impl("rope_2d.cuda", TORCH_BOX(&rope_2d));
}

}  // namespace patchpack
