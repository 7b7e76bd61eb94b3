// Rotary position embedding over time, height and width; the maths is in patchpack.reference.mrope.
#include "rotary.cuh"

namespace patchpack {

struct PositionPlaces {
  Positions positions;

  HOST_DEVICE Place operator()(int64_t token) const {
    return {positions.at(0, token), positions.at(1, token), positions.at(2, token)};
  }
};

std::tuple<Tensor, Tensor> mrope(Tensor q, Tensor k, Tensor position_ids,
                                 std::vector<int64_t> sections, bool sections_interleaved,
                                 double base, bool inverse) {
  const PositionPlaces places{positions_of(position_ids)};
  const auto& frequencies = frequencies_3d(sections, sections_interleaved, base);
  return rotate<false>(q, k, places, frequencies, inverse);
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, PATCHPACK_DEVICE, library) {
  library.impl("mrope.cuda", TORCH_BOX(&mrope));
}

}  // namespace patchpack
