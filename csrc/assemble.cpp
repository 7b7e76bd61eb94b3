// One sequence of maps and learned vectors; the maths is in patchpack.reference.assemble.
#include "past_caches.h"
#include "resample_tables.h"
#include "rows.h"
#include "sums.h"

namespace patchpack {
namespace {

// A row of `TokenLayout.table`. A learned vector is a map of one row without columns: it is what
// ends that row.
struct Part {
  int64_t begin;                                      // in the sequence
  int64_t first, tile_rows, tile_cols, down, across;  // its tiles of tokens
  int64_t top, left, height, width;                   // what is kept of the map
  int64_t rows, cols;                                 // after resizing
  int64_t newline;                                    // the vector that ends a row, or -1

  int64_t row_length() const { return cols + (newline >= 0); }
  bool is_resized() const { return cols > 0 && (rows != height || cols != width); }
  int64_t token_at(int64_t row, int64_t col) const {  // of what is kept
    const int64_t y = top + row, x = left + col;
    const int64_t tile = y / tile_rows * across + x / tile_cols;
    return first + tile * tile_rows * tile_cols + y % tile_rows * tile_cols + x % tile_cols;
  }
};
static_assert(sizeof(Part) == 13 * sizeof(int64_t));

// A row of `TokenLayout.maps`.
struct Map {
  int64_t first, part, num_tokens;
};

struct Layout {
  ScalarType dtype;
  const Part* parts;
  const Map* maps;
  int64_t num_parts, num_maps;
  bool past_caches;
  std::vector<const ResizeMatrix*> rows = {}, cols = {};  // of each part, if it is resized
};

Layout layout_of(const Tensor& x, const Tensor& out, const Tensor& table, const Tensor& maps,
                 ResizeMatrices& matrices) {
  Layout layout{x.scalar_type(), (const Part*)table.const_data_ptr<int64_t>(),
                (const Map*)maps.const_data_ptr<int64_t>(), table.size(0) - 1, maps.size(0) - 1,
                past_caches(x, out)};
  for (int64_t i = 0; i < layout.num_parts; ++i) {
    const Part& part = layout.parts[i];
    layout.rows.push_back(part.is_resized() ? matrices.of(part.height, part.rows) : nullptr);
    layout.cols.push_back(part.is_resized() ? matrices.of(part.width, part.cols) : nullptr);
  }
  return layout;
}

}  // namespace
}  // namespace patchpack

#define KERNELS "assemble.h"
#include "foreach_level.h"

namespace patchpack {

std::tuple<Tensor, Tensor> assemble(Tensor tokens, std::optional<Tensor> vectors, Tensor table,
                                    Tensor maps, int64_t num_tokens) {
  const Tensor out = empty({num_tokens, tokens.size(2)}, tokens.scalar_type());
  const Tensor labels = empty({vectors ? num_tokens : 0}, ScalarType::Int);
  tokens = last_contiguous(tokens);
  const Tensor learned = last_contiguous(vectors.value_or(tokens));
  const Rows from_tokens(tokens), from_vectors(learned);
  ResizeMatrices matrices({ResampleMode::bilinear, false, false}, false);
  const Layout layout = layout_of(tokens, out, table, maps, matrices);
  int32_t* label = vectors ? labels.mutable_data_ptr<int32_t>() : nullptr;
  char* data = (char*)out.mutable_data_ptr();
  parallel_for(num_tokens, from_tokens.num_channels, [&](int64_t begin, int64_t end) {
    AT_LEVEL(assemble(layout, from_tokens, from_vectors, data, label, begin, end));
  });
  return {out, labels};
}

std::tuple<Tensor, Tensor> assemble_backward(Tensor grad, Tensor labels, Tensor table, Tensor maps,
                                             int64_t num_tiles, int64_t tile_size,
                                             int64_t num_vectors) {
  const Tensor grad_tokens = empty({num_tiles, tile_size, grad.size(1)}, grad.scalar_type());
  grad = last_contiguous(grad);
  const Rows from(grad);
  ResizeMatrices matrices({ResampleMode::bilinear, false, false}, true);
  const Layout layout = layout_of(grad, grad_tokens, table, maps, matrices);
  char* data = (char*)grad_tokens.mutable_data_ptr();
  parallel_for(num_tiles * tile_size, from.num_channels, [&](int64_t begin, int64_t end) {
    AT_LEVEL(assemble_backward(layout, from, data, begin, end));
  });
  return {grad_tokens, sum_rows(grad, labels, num_vectors)};
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("assemble.native", TORCH_BOX(&assemble));
  library.impl("assemble_backward.native", TORCH_BOX(&assemble_backward));
}

}  // namespace patchpack
