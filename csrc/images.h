// Images of different sizes and any strides, and the strips of patches that they are cut into.
#pragma once

#include <algorithm>
#include <vector>

#include "grid.h"
#include "past_caches.h"
#include "tensor.h"

namespace patchpack {

// `[F, C, H, W]`; a tensor `[C, H, W]` is one frame.
struct Pixels {
  const void* data;
  int64_t frames, channels, height, width;
  int64_t stride_f, stride_c, stride_y, stride_x;
};

inline Pixels pixels(const Tensor& x) {
  const int64_t axis = x.dim() - 3;
  return {x.const_data_ptr(),
          axis ? x.size(0) : 1,
          x.size(axis),
          x.size(axis + 1),
          x.size(axis + 2),
          axis ? x.stride(0) : 0,
          x.stride(axis),
          x.stride(axis + 1),
          x.stride(axis + 2)};
}

inline std::vector<Pixels> pixels(const std::vector<Tensor>& images) {
  std::vector<Pixels> all;
  for (const Tensor& image : images) all.push_back(pixels(image));
  return all;
}

constexpr int64_t kCachedValues = 1 << 20;

// What a patch is: `[channels, temporal, size, size]`, or `[size, size, channels]` if interleaved.
struct Patch {
  ScalarType pixel, dtype;
  int64_t size, temporal, merge, channels;
  bool interleaved;
  bool past_caches;  // patches are more than a cache holds
  std::vector<float> mean, std, inverse_std;  // of the columns of a row of a patch, then the next

  int64_t num_runs() const { return interleaved ? 1 : channels; }
  int64_t run() const { return interleaved ? size * channels : size; }
  int64_t num_columns() const { return channels * temporal * size * size; }
  void* row_of(void* out, int64_t token) const {
    return (char*)out + token * num_columns() * (dtype == ScalarType::Float ? 4 : 2);
  }
};

inline Patch patch_of(ScalarType pixel, ScalarType dtype, int64_t size, int64_t temporal,
                      int64_t merge, const std::vector<double>& mean,
                      const std::vector<double>& std, bool interleaved, int64_t num_tokens = 0) {
  const int64_t channels = (int64_t)mean.size();
  Patch patch{pixel, dtype, size, temporal, merge, channels, interleaved, false, {}, {}, {}};
  patch.past_caches = num_tokens * patch.num_columns() > kCachedValues;
  for (int64_t i = 0; i < channels * size; ++i) {
    const int64_t channel = interleaved ? i % channels : i / size;
    patch.mean.push_back((float)mean[channel]);
    patch.std.push_back((float)std[channel]);
    patch.inverse_std.push_back(1.0f / (float)std[channel]);
  }
  return patch;
}

// Frames, rows and columns of patches of `grid` are those of an image.
inline void check_grid(const Geometry& geometry, int64_t grid, int64_t frames, int64_t height,
                       int64_t width) {
  const int64_t tokens = geometry.first(grid + 1) - geometry.first(grid);
  STD_TORCH_CHECK(geometry.height(grid) == height && geometry.width(grid) == width &&
                      tokens == frames * height * width,
                  "grid must be the patches of images, it is not of images[", grid, "]");
}

// Calls `body(begin, end)` over parts of all strips, each the patches of a row of merge blocks.
template <typename Body>
void parallel_over_strips(const Geometry& geometry, const Patch& patch, int64_t cost,
                          const Body& body) {
  int64_t count = 0, tokens = geometry.num_tokens();
  for (int64_t grid = 0; grid < geometry.num_grids; ++grid)
    if (geometry.width(grid) > 0)
      count += (geometry.first(grid + 1) - geometry.first(grid)) /
               (geometry.width(grid) * patch.merge);
  parallel_for(count, cost * tokens / std::max<int64_t>(1, count), body);
}

struct Strip {
  int64_t grid, frame, row;  // of merge blocks
  int64_t token;             // the first
  int64_t left;              // strips from here on, this one too
};

// Calls `body(strip)` for the strips `[begin, end)` of all grids.
template <typename Body>
void for_strips(const Geometry& geometry, const Patch& patch, int64_t begin, int64_t end,
                const Body& body) {
  int64_t strip = 0;
  for (int64_t grid = 0; grid < geometry.num_grids && strip < end; ++grid) {
    const int64_t tokens = geometry.width(grid) * patch.merge;  // of a strip
    if (tokens == 0) continue;
    const int64_t first = geometry.first(grid), rows = geometry.height(grid) / patch.merge;
    const int64_t last = strip + (geometry.first(grid + 1) - first) / tokens;
    for (int64_t i = std::max(begin, strip); i < std::min(end, last); ++i)
      body(Strip{grid, (i - strip) / rows, (i - strip) % rows, first + (i - strip) * tokens,
                 end - i});
    strip = last;
  }
}

}  // namespace patchpack
