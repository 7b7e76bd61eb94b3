// Square blocks of the maps of packed images, each of which becomes one token.
#pragma once

#include <vector>

#include "grid.h"

namespace patchpack {

struct Block {
  int64_t frame, row, col;  // the frame's first token, and the place in it of the block's first
  int64_t size, width, merge;

  // Token `k` of the block, row by row.
  HOST_DEVICE int64_t token(int64_t k) const {
    return frame + cell_to_token(row + k / size, col + k % size, width, merge);
  }
};

// Blocks follow each other frame by frame, within a frame by rows or by columns.
struct Blocks {
  Geometry geometry;
  int64_t merge, size;  // of the order of tokens, and of the blocks
  bool by_column;

  HOST_DEVICE int64_t area() const { return size * size; }

  // Block `n` of all, which is in `grid`.
  HOST_DEVICE Block at(int64_t n, int64_t grid) const {
    const int64_t height = geometry.height(grid), width = geometry.width(grid);
    const int64_t place = n * area(), in_frame = (place - geometry.first(grid)) % (height * width);
    const int64_t block = in_frame / area(), in_line = (by_column ? height : width) / size;
    const int64_t line = block / in_line * size, along = block % in_line * size;
    const int64_t row = by_column ? along : line, col = by_column ? line : along;
    return {place - in_frame, row, col, size, width, merge};
  }
};

// The tokens of block `n`, row by row: their numbers, and where in `x` each begins.
template <typename T>
struct BlockTokens {
  int64_t n;
  const int64_t* tokens;
  T* const* x;
  int64_t ahead;  // how much further those of the next block may begin, for prefetching
};

// `body(block)` for the blocks `[begin, end)` of the tokens `x`, which are `stride` apart.
template <typename T, typename Body>
void for_blocks(const Blocks& blocks, T* x, int64_t stride, int64_t begin, int64_t end,
                const Body& body) {
  const int64_t area = blocks.area();
  std::vector<int64_t> tokens(area);
  std::vector<T*> places(area, x);
  int64_t grid = blocks.geometry.find(begin * area);
  for (int64_t n = begin; n < end; ++n) {
    while (n * area >= blocks.geometry.first(grid + 1)) ++grid;
    const Block block = blocks.at(n, grid);
    const T* last = places[0];
    for (int64_t k = 0; k < area; ++k) {
      tokens[k] = block.token(k);
      places[k] = x + tokens[k] * stride;
    }
    body(BlockTokens<T>{n, tokens.data(), places.data(), places[0] - last});
  }
}

}  // namespace patchpack
