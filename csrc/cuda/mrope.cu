// Rotary position embedding over time, height and width; the maths is in patchpack.reference.mrope.
#include "rotary.cuh"

namespace patchpack {

struct PositionPlaces {
  Positions positions;

  HOST_DEVICE Place operator()(int64_t token) const {
    return {positions.at(0, token), positions.at(1, token), positions.at(2, token)};
  }
};

void rotate_3d(const Turned& q, const Turned& k, const Tensor& position_ids,
               const std::vector<int64_t>& sections, bool sections_interleaved, double base,
               bool inverse) {
  const PositionPlaces places{positions_of(position_ids)};
  const auto& frequencies = frequencies_3d(sections, sections_interleaved, base);
  rotate<false>(q, k, places, frequencies, inverse);
}

std::tuple<Tensor, Tensor> mrope(Tensor q, Tensor k, Tensor position_ids,
                                 std::vector<int64_t> sections, bool sections_interleaved,
                                 double base, bool inverse) {
  const Turned turned[] = {to_elsewhere(q), to_elsewhere(k)};
  rotate_3d(turned[0], turned[1], position_ids, sections, sections_interleaved, base, inverse);
  return {turned[0].out, turned[1].out};
}

void mrope_(Tensor q, Tensor k, Tensor position_ids, std::vector<int64_t> sections,
            bool sections_interleaved, double base, bool inverse) {
  rotate_3d(in_place(q), in_place(k), position_ids, sections, sections_interleaved, base, inverse);
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, PATCHPACK_DEVICE, library) {
  library.impl("mrope.cuda", TORCH_BOX(&mrope));
  library.impl("mrope_.cuda", TORCH_BOX(&mrope_));
}

}  // namespace patchpack
