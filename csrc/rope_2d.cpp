// Rotary position embedding by row and column; the maths is in patchpack.reference.rope_2d.
#include "angles.h"
#include "grid.h"
#include "rotary.h"

namespace patchpack {
namespace {

// Cosines, then sines, of every pair at every row and at every column.
struct AngleTable {
  const std::vector<Frequency>& frequencies;
  int64_t num_pairs, num_positions;
  float* values;

  float* cos(int32_t axis, int64_t position) const {
    return values + (axis * num_positions + position) * 2 * num_pairs;
  }
  float* sin(int32_t axis, int64_t position) const { return cos(axis, position) + num_pairs; }
};

}  // namespace
}  // namespace patchpack

#define KERNELS "rope_2d.h"
#include "foreach_level.h"

namespace patchpack {

void rotate_2d(const Turned& q, const Turned& k, const Tensor& geometry_tensor, int64_t merge,
               double base, bool interleaved, const std::string& axes, bool inverse) {
  const Geometry geometry{geometry_tensor.const_data_ptr<int64_t>(), geometry_tensor.size(0) - 1};
  int64_t longest = 0;
  for (int64_t grid = 0; grid < geometry.num_grids; ++grid)
    longest = std::max({longest, geometry.height(grid), geometry.width(grid)});

  const int64_t num_pairs = q.x.size(2) / 2;
  const Tensor values = empty({2, longest, 2, num_pairs}, ScalarType::Float);
  const AngleTable table{frequencies_2d(num_pairs, base, axes), num_pairs, longest,
                         values.mutable_data_ptr<float>()};
  parallel_for(longest, 64 * num_pairs, [&](int64_t begin, int64_t end) {
    AT_LEVEL(fill_angles(table, begin, end));
  });
  rotate_both(q, k, num_pairs, interleaved, inverse,
              [&](const Rotation& r, int64_t begin, int64_t end) {
                AT_LEVEL(rope_2d(r, geometry, table, merge, begin, end));
              });
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

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("rope_2d.native", TORCH_BOX(&rope_2d));
  library.impl("rope_2d_.native", TORCH_BOX(&rope_2d_));
}

}  // namespace patchpack
