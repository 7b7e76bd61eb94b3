// Rotary position embedding over time, height and width; the maths is in patchpack.reference.mrope.
#include "rotary.h"

#define KERNELS "mrope.h"
#include "foreach_level.h"

namespace patchpack {

std::tuple<Tensor, Tensor> mrope(Tensor q, Tensor k, Tensor position_ids,
                                 std::vector<int64_t> sections, bool sections_interleaved,
                                 double base, bool inverse) {
  const Positions positions = positions_of(position_ids);
  const auto& frequencies = frequencies_3d(sections, sections_interleaved, base);
  return rotate_both(q, k, (int64_t)frequencies.size(), false, inverse,
                     [&](const Rotation& r, int64_t begin, int64_t end) {
                       AT_LEVEL(mrope(r, positions, frequencies, begin, end));
                     });
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("mrope.native", TORCH_BOX(&mrope));
}

}  // namespace patchpack
