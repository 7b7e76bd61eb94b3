// The matrices of resized axes, which all channels and all rows of a map share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "grid.h"
#include "resample.h"
#include "tensor.h"

namespace patchpack {

inline Filter filter_of(const std::string& mode, bool align_corners, bool antialias) {
  constexpr const char* kNames[] = {"bilinear", "bicubic", "area", "max", "nearest"};
  const auto name = std::find(std::begin(kNames), std::end(kNames), mode);
  return {(ResampleMode)(name - kNames), align_corners, antialias};
}

inline Geometry geometry_of(const Tensor& geometry) {
  return {geometry.const_data_ptr<int64_t>(), geometry.size(0) - 1};
}

inline int64_t num_frames(const Geometry& geometry, int64_t grid) {
  const int64_t area = geometry.height(grid) * geometry.width(grid);
  return (geometry.first(grid + 1) - geometry.first(grid)) / area;
}

// The tokens of a frame's cells, counted from its first.
class CellTokens {
 public:
  CellTokens(int64_t height, int64_t width, int64_t merge) : rows_(height), cols_(width) {
    for (int64_t row = 0; row < height; ++row) rows_[row] = cell_to_token(row, 0, width, merge);
    for (int64_t col = 0; col < width; ++col) cols_[col] = cell_to_token(0, col, width, merge);
  }
  int64_t operator()(int64_t row, int64_t col) const { return rows_[row] + cols_[col]; }

 private:
  std::vector<int64_t> rows_, cols_;
};

// Of each grid.
inline std::vector<CellTokens> cell_tokens(const Geometry& geometry, int64_t merge) {
  std::vector<CellTokens> cells;
  for (int64_t grid = 0; grid < geometry.num_grids; ++grid)
    cells.emplace_back(geometry.height(grid), geometry.width(grid), merge);
  return cells;
}

struct Entry {
  int32_t index;
  float weight;
};

// A sparse matrix, its entries row by row: what every output of an axis is the sum of.
struct ResizeMatrix {
  std::vector<int64_t> begins;  // [rows + 1]
  std::vector<Entry> entries;
  std::vector<float> scales;  // [rows], of weights that are normalised
  int64_t longest = 0;        // row, in entries

  int64_t count() const { return (int64_t)begins.size() - 1; }
  int64_t count(int64_t row) const { return begins[row + 1] - begins[row]; }
  const Entry* begin(int64_t row) const { return entries.data() + begins[row]; }
  const Entry* end(int64_t row) const { return entries.data() + begins[row + 1]; }
};

inline ResizeMatrix resize_matrix(Filter filter, int64_t num_in, int64_t num_out) {
  const ResampledAxis axis = resampled_axis(filter, num_in, num_out);
  ResizeMatrix matrix{{0}, {}, {}, 0};
  matrix.begins.reserve(num_out + 1);
  matrix.scales.reserve(filter.normalised() ? num_out : 0);
  for (int64_t o = 0; o < num_out; ++o) {
    const Taps taps = find_taps(filter, axis, o);
    if (o == 0) matrix.entries.reserve(taps.count * num_out);
    float total = 0.0f;
    for (int64_t k = 0; k < taps.count; ++k) {
      const float weight = weight_at(filter, axis, taps.distance + k * axis.unit);
      const int32_t i = (int32_t)std::clamp<int64_t>(taps.first + k, 0, num_in - 1);
      const bool again = (int64_t)matrix.entries.size() > matrix.begins[o] &&
                         matrix.entries.back().index == i;
      total += weight;
      if (again)
        matrix.entries.back().weight += weight;
      else if (weight != 0.0f)
        matrix.entries.push_back({i, weight});
    }
    if (filter.normalised()) {
      for (size_t k = matrix.begins[o]; k < matrix.entries.size(); ++k)
        matrix.entries[k].weight /= total;
      matrix.scales.push_back(1.0f / total);
    }
    matrix.begins.push_back((int64_t)matrix.entries.size());
    matrix.longest = std::max(matrix.longest, matrix.count(o));
  }
  return matrix;
}

// Of inputs: the outputs that read them.
inline ResizeMatrix transposed(const ResizeMatrix& matrix, int64_t num_in, int64_t num_out) {
  ResizeMatrix result{std::vector<int64_t>(num_in + 1), {}, {}, 0};
  for (const Entry& entry : matrix.entries) ++result.begins[entry.index + 1];
  for (int64_t i = 0; i < num_in; ++i) {
    result.longest = std::max(result.longest, result.begins[i + 1]);
    result.begins[i + 1] += result.begins[i];
  }
  result.entries.resize(matrix.entries.size());
  std::vector<int64_t> next(result.begins.begin(), result.begins.end() - 1);
  for (int64_t o = 0; o < num_out; ++o)
    for (const Entry* entry = matrix.begin(o); entry != matrix.end(o); ++entry)
      result.entries[next[entry->index]++] = {(int32_t)o, entry->weight};
  return result;
}

// The matrices of rows and of columns of each grid. Axes of the same sizes share one.
class ResizeMatrices {
 public:
  ResizeMatrices(Filter filter, bool transpose) : filter_(filter), transpose_(transpose) {}

  const ResizeMatrix* of(int64_t num_in, int64_t num_out) {
    const auto [place, is_new] = known_.try_emplace({num_in, num_out});
    if (is_new) {
      place->second = resize_matrix(filter_, num_in, num_out);
      if (transpose_) place->second = transposed(place->second, num_in, num_out);
    }
    return &place->second;
  }

 private:
  Filter filter_;
  bool transpose_;
  std::map<std::pair<int64_t, int64_t>, ResizeMatrix> known_;
};

}  // namespace patchpack
