// Where the tokens of packed images are: the geometry of a PackedGrid, and the order of a map.
#pragma once

#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace patchpack {

// The last of `count` places, `first(i)`, that is not after `place`, or place 0: a binary search.
template <typename First>
HOST_DEVICE int64_t find_place(int64_t count, int64_t place, const First& first) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first(middle) <= place)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// `geometry` is int64 `[G + 1, 3]`: first token, rows and columns of each grid; then `(T, 1, 1)`.
struct Geometry {
  const int64_t* rows;
  int64_t num_grids;

  HOST_DEVICE int64_t first(int64_t grid) const { return rows[3 * grid]; }
  HOST_DEVICE int64_t height(int64_t grid) const { return rows[3 * grid + 1]; }
  HOST_DEVICE int64_t width(int64_t grid) const { return rows[3 * grid + 2]; }
  HOST_DEVICE int64_t num_tokens() const { return first(num_grids); }

  // The grid that holds `token`.
  HOST_DEVICE int64_t find(int64_t token) const {
    return find_place(num_grids, token, [this](int64_t grid) { return first(grid); });
  }
};

struct Cell {
  int64_t row, col;
};

// Row and column of a frame's token, counted from the frame's first, in merge-block order. Like the
// next, it divides integers of the type of its first argument: a GPU is slow with 64 bits.
template <typename Int>
HOST_DEVICE Cell token_to_cell(Int token, std::type_identity_t<Int> width,
                               std::type_identity_t<Int> merge) {
  if (merge == 1) return {token / width, token % width};
  const Int block = token / (merge * merge), in_block = token % (merge * merge);
  const Int blocks_in_row = width / merge;
  return {block / blocks_in_row * merge + in_block / merge,
          block % blocks_in_row * merge + in_block % merge};
}

// The inverse of `token_to_cell`.
template <typename Int>
HOST_DEVICE Int cell_to_token(Int row, std::type_identity_t<Int> col,
                              std::type_identity_t<Int> width, std::type_identity_t<Int> merge) {
  if (merge == 1) return row * width + col;
  const Int block = (row / merge) * (width / merge) + col / merge;
  return block * (merge * merge) + (row % merge) * merge + col % merge;
}

}  // namespace patchpack
