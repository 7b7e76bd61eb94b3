// Square blocks of the maps of packed images, frame by frame, within a frame by rows or by columns:
// what becomes one token.
#pragma once

#include <vector>

#include "grid.h"

namespace patchpack {

struct Block {
  int64_t frame, row, col;  // the frame's first token, and where in it the block begins
  int64_t size, width, merge;

  // Token `k` of the block, row by row.
  HOST_DEVICE int64_t token(int64_t k) const {
    return frame + cell_to_token(row + k / size, col + k % size, width, merge);
  }
};

struct Blocks {
  Geometry geometry;
  int64_t merge, size;  // of the order of tokens, and of the blocks
  bool by_column;

  HOST_DEVICE int64_t area() const { return size * size; }

  // Block `n` of all, which is in `grid`.
  HOST_DEVICE Block at(int64_t n, int64_t grid) const {
    const int64_t height = geometry.height(grid), width = geometry.width(grid);
    const int64_t in_grid = n * area() - geometry.first(grid), in_frame = in_grid % (height * width);
    const int64_t frame = geometry.first(grid) + in_grid - in_frame, block = in_frame / area();
    const int64_t many = (by_column ? height : width) / size;
    const int64_t across = block / many * size, along = block % many * size;
    return {frame, by_column ? along : across, by_column ? across : along, size, width, merge};
  }
};

// The tokens of block `n`, row by row: their numbers, and where in `x` each begins.
template <typename T>
struct Found {
  int64_t n;
  const int64_t* tokens;
  const T* const* x;
  int64_t ahead;  // from there to where those of the next block may begin: to be prefetched
};

// `body(found)` for the blocks `[begin, end)` of tokens `x`, `stride` elements apart.
template <typename T, typename Body>
void for_blocks(const Blocks& blocks, const T* x, int64_t stride, int64_t begin, int64_t end,
                const Body& body) {
  std::vector<int64_t> tokens(blocks.area());
  std::vector<const T*> places(blocks.area(), x);
  int64_t grid = blocks.geometry.find(begin * blocks.area());
  for (int64_t n = begin; n < end; ++n) {
    while (n * blocks.area() >= blocks.geometry.first(grid + 1)) ++grid;
    const Block block = blocks.at(n, grid);
    const T* before = places[0];
    for (int64_t k = 0; k < blocks.area(); ++k) {
      tokens[k] = block.token(k);
      places[k] = x + tokens[k] * stride;
    }
    body(Found<T>{n, tokens.data(), places.data(), places[0] - before});
  }
}

}  // namespace patchpack
