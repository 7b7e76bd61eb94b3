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

void rotate_2d(const Turned& q, const Turned& k, const Tensor& geometry, int64_t merge, double base,
               bool interleaved, const std::string& axes, bool inverse) {
  const GridPlaces places{{geometry.const_data_ptr<int64_t>(), geometry.size(0) - 1},
                          (int32_t)merge};
  const auto& frequencies = frequencies_2d(q.x.size(2) / 2, base, axes);
  interleaved ? rotate<true>(q, k, places, frequencies, inverse)
              : rotate<false>(q, k, places, frequencies, inverse);
}

std::tuple<Tensor, Tensor> rope_2d(Tensor q, Tensor k, Tensor geometry, int64_t merge, double base,
                                   bool interleaved, std::string axes, bool inverse) {
  const Turned turned[] = {to_elsewhere(q), to_elsewhere(k)};
  rotate_2d(turned[0], turned[1], geometry, merge, base, interleaved, axes, inverse);
  return {turned[0].out, turned[1].out};
}

void rope_2d_(Tensor q, Tensor k, Tensor geometry, int64_t merge, double base, bool interleaved,
              std::string axes, bool inverse) {
  rotate_2d(in_place(q), in_place(k), geometry, merge, base, interleaved, axes, inverse);
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, PATCHPACK_DEVICE, library) {
  library.impl("rope_2d.cuda", TORCH_BOX(&rope_2d));
  library.impl("rope_2d_.cuda", TORCH_BOX(&rope_2d_));
}

}  // namespace patchpack
