// Kernels of patchpack.ops.rope_2d for one level of the CPU: see level.h.
#include "rotary_kernels.h"

namespace patchpack::LEVEL {

// Positions `[begin, end)` of the tables.
inline void fill_angles(const AngleTable& t, int64_t begin, int64_t end) {
  for (int32_t axis = 0; axis < 2; ++axis)
    for (int64_t position = begin; position < end; ++position) {
      float *cos = t.cos(axis, position), *sin = t.sin(axis, position);
      for (int64_t i = 0; i < t.num_pairs; ++i) {
        const Frequency f = t.frequencies[i];
        float c, s;
        cos_sin((int32_t)position, f.high, f.low, c, s);
        cos[i] = f.axis == axis ? c : 0.0f;
        sin[i] = f.axis == axis ? s : 0.0f;
      }
    }
}

inline void rope_2d(const Rotation& r, const Geometry& geometry, const AngleTable& table,
                    int64_t merge, int64_t begin, int64_t end) {
  int64_t grid = geometry.find(begin);
  rotate_tokens(r, begin, end, [&](int64_t token, float* cos, float* sin) {
    while (token >= geometry.first(grid + 1)) ++grid;
    const int64_t width = geometry.width(grid);
    const int64_t in_frame = (token - geometry.first(grid)) % (geometry.height(grid) * width);
    const Cell cell = token_to_cell(in_frame, width, merge);
    const float *row = table.cos(0, cell.row), *col = table.cos(1, cell.col);
    const float *row_sin = table.sin(0, cell.row), *col_sin = table.sin(1, cell.col);
    for (int64_t i = 0; i < r.num_pairs; ++i) {
      // a pair's angle is of one axis: the other table has zeros there
      cos[i] = row[i] + col[i];
      sin[i] = row_sin[i] + col_sin[i];
    }
  });
}

}  // namespace patchpack::LEVEL
