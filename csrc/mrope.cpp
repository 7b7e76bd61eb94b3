// Rotary position embedding over time, height and width; the maths is in patchpack.reference.mrope.
#include "angles.h"
#include "rotary.h"

namespace patchpack {
namespace {

// `[3, T]`, int32 or int64.
struct Positions {
  const void* values;
  bool is_long;
  int64_t stride_axis, stride_token;

  int32_t at(int64_t axis, int64_t token) const {
    const int64_t i = axis * stride_axis + token * stride_token;
    return is_long ? (int32_t)((const int64_t*)values)[i] : ((const int32_t*)values)[i];
  }
};

}  // namespace
}  // namespace patchpack

#define KERNELS "mrope.h"
#include "foreach_level.h"

namespace patchpack {
namespace {

std::vector<Frequency> frequencies_3d(const std::vector<int64_t>& sections, bool interleaved,
                                      double base) {
  const int64_t num_pairs = sections[0] + sections[1] + sections[2];
  std::vector<Frequency> pairs;
  for (int64_t j = 0; j < num_pairs; ++j) {
    int32_t axis = j < sections[0] ? 0 : j < sections[0] + sections[1] ? 1 : 2;
    if (interleaved) axis = j < 3 * sections[j % 3] ? j % 3 : 0;
    pairs.push_back(frequency(axis, base, j, num_pairs));
  }
  return pairs;
}

}  // namespace

std::tuple<Tensor, Tensor> mrope(Tensor q, Tensor k, Tensor position_ids,
                                 std::vector<int64_t> sections, bool sections_interleaved,
                                 double base, bool inverse) {
  // of four rows the first is that of text, which has no say
  const Tensor last = torch::stable::narrow(position_ids, 0, position_ids.size(0) - 3, 3);
  const Positions positions{last.const_data_ptr(), last.scalar_type() == ScalarType::Long,
                            last.stride(0), last.stride(1)};
  const auto frequencies = frequencies_3d(sections, sections_interleaved, base);
  return rotate_both(q, k, (int64_t)frequencies.size(), false, inverse,
                     [&](const Rotation& r, int64_t begin, int64_t end) {
                       AT_LEVEL(mrope(r, positions, frequencies, begin, end));
                     });
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("mrope.native", TORCH_BOX(&mrope));
}

}  // namespace patchpack
