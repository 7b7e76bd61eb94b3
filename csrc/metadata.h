// Kernels of metadata.cpp for one level of the CPU: see level.h.

namespace patchpack::LEVEL {

// `count` tokens as those right before them, `step` further on one axis.
template <int kAxes>
inline void continue_along(int axis, int64_t step, int64_t count, int64_t* __restrict out) {
  const int64_t* __restrict before = out - count * kAxes;
  for (int64_t i = 0; i < count * kAxes; i += kAxes)
    for (int j = 0; j < kAxes; ++j) out[i + j] = before[i + j] + (j == axis ? step : 0);
}

// Row and column of the tokens of a grid, or frame, row and column: a block, then all that repeats.
template <int kAxes>
inline void fill_position_ids(const Grid& g, int64_t* out) {
  const int row = kAxes - 2, col = kAxes - 1;
  const int64_t m = g.merge, block = m * m, band = m * g.cols, frame = g.rows * g.cols;
  for (int64_t i = 0; i < block; ++i) {
    int64_t* token = out + i * kAxes;
    token[0] = 0;
    token[row] = i / m;
    token[col] = i % m;
  }
  for (int64_t i = block; i < band; i += block)
    continue_along<kAxes>(col, m, block, out + i * kAxes);
  for (int64_t i = band; i < frame; i += band)
    continue_along<kAxes>(row, m, band, out + i * kAxes);
  for (int64_t i = frame; i < g.num_tokens(); i += frame)
    continue_along<kAxes>(0, kAxes - 2, frame, out + i * kAxes);
}

inline void fill_position_ids(const Grids& grids, bool with_frame, int64_t* out) {
  for (const Grid& g : grids) {
    if (with_frame)
      fill_position_ids<3>(g, out);
    else
      fill_position_ids<2>(g, out);
    out += g.num_tokens() * (with_frame ? 3 : 2);
  }
}

}  // namespace patchpack::LEVEL
