// Adding a resized table of position embeddings; the maths is in patchpack.reference.add_pos_embed.
#include "past_caches.h"
#include "resample_tables.h"

namespace patchpack {
namespace {

struct Tokens {
  ScalarType dtype;
  const void* data;
  int64_t stride;
};

// A row of an image or clip, and how many tokens come before it.
struct ImageRow {
  int64_t grid, row, begin;
};

// The table and the images it is resized to. Matrices, cells and sums are those of each grid.
struct PosEmbed {
  Geometry geometry;
  std::vector<CellTokens> cells;
  std::vector<const ResizeMatrix*> rows, cols;
  int64_t num_channels;
  ScalarType table_dtype;
  // of the forward pass
  const void* table;
  int64_t stride_row, stride_col;
  bool past_caches;
  std::vector<ImageRow> image_rows;  // and a last one where they end
  // of the backward pass
  std::vector<float*> frame_sums;  // null unless there are several frames
};

}  // namespace
}  // namespace patchpack

#define KERNELS "add_pos_embed.h"
#include "foreach_level.h"

namespace patchpack {
namespace {

Tokens tokens_of(const Tensor& x) { return {x.scalar_type(), x.const_data_ptr(), x.stride(0)}; }

PosEmbed pos_embed(const Tensor& geometry, int64_t merge, int64_t rows, int64_t cols,
                   int64_t num_channels, ScalarType table_dtype, ResizeMatrices& matrices) {
  PosEmbed e{geometry_of(geometry), {}, {}, {}, num_channels, table_dtype,
             nullptr, 0, 0, false, {}, {}};
  e.cells = cell_tokens(e.geometry, merge);
  for (int64_t grid = 0; grid < e.geometry.num_grids; ++grid) {
    e.rows.push_back(matrices.of(rows, e.geometry.height(grid)));
    e.cols.push_back(matrices.of(cols, e.geometry.width(grid)));
  }
  return e;
}

// By the rows of the table they read, which then stay in cache from one image to the next.
std::vector<ImageRow> rows_by_table(const PosEmbed& e, int64_t num_tokens) {
  std::vector<ImageRow> image_rows;
  for (int64_t grid = 0; grid < e.geometry.num_grids; ++grid)
    for (int64_t row = 0; row < e.geometry.height(grid); ++row)
      image_rows.push_back({grid, row, 0});
  const auto reads = [&](const ImageRow& r) { return e.rows[r.grid]->begin(r.row)->index; };
  std::stable_sort(image_rows.begin(), image_rows.end(), [&](const ImageRow& a, const ImageRow& b) {
    return reads(a) < reads(b);
  });
  int64_t begin = 0;
  for (ImageRow& r : image_rows) {
    r.begin = begin;
    begin += e.geometry.width(r.grid) * num_frames(e.geometry, r.grid);
  }
  image_rows.push_back({0, 0, num_tokens});
  return image_rows;
}

}  // namespace

std::tuple<Tensor, Tensor> add_pos_embed(Tensor x, Tensor table, Tensor geometry, int64_t merge,
                                         std::string mode, bool align_corners, bool antialias) {
  x = last_contiguous(x);
  table = last_contiguous(table);
  const int64_t num_tokens = x.size(0), num_channels = x.size(1);
  const Tensor out = empty_of(x);
  const Tensor scales = empty({antialias ? num_tokens : 0}, ScalarType::Float);

  ResizeMatrices matrices(filter_of(mode, align_corners, antialias), false);
  PosEmbed e = pos_embed(geometry, merge, table.size(0), table.size(1), num_channels,
                         table.scalar_type(), matrices);
  e.table = table.const_data_ptr();
  e.stride_row = table.stride(0);
  e.stride_col = table.stride(1);
  e.past_caches = past_caches(x, out);
  e.image_rows = rows_by_table(e, num_tokens);
  float* scale = antialias ? scales.mutable_data_ptr<float>() : nullptr;
  parallel_for(num_tokens, 2 * num_channels, [&](int64_t begin, int64_t end) {
    AT_LEVEL(add_embeddings(e, tokens_of(x), out.mutable_data_ptr(), scale, begin, end));
  });
  return {out, scales};
}

Tensor add_pos_embed_backward(Tensor grad, Tensor, Tensor geometry, int64_t rows, int64_t cols,
                              ScalarType table_dtype, int64_t merge, std::string mode,
                              bool align_corners, bool antialias) {
  grad = last_contiguous(grad);
  const int64_t num_tokens = grad.size(0), num_channels = grad.size(1);
  const Tensor grad_table = empty({rows, cols, num_channels}, table_dtype);

  ResizeMatrices matrices(filter_of(mode, align_corners, antialias), true);
  PosEmbed e = pos_embed(geometry, merge, rows, cols, num_channels, table_dtype, matrices);
  int64_t num_cells = 0;
  for (int64_t grid = 0; grid < e.geometry.num_grids; ++grid)
    if (num_frames(e.geometry, grid) > 1)
      num_cells += e.geometry.height(grid) * e.geometry.width(grid);
  const Tensor sums = empty({num_cells, num_channels}, ScalarType::Float);
  float* next = sums.mutable_data_ptr<float>();
  for (int64_t grid = 0; grid < e.geometry.num_grids; ++grid) {
    const bool clip = num_frames(e.geometry, grid) > 1;
    e.frame_sums.push_back(clip ? next : nullptr);
    if (clip) next += e.geometry.height(grid) * e.geometry.width(grid) * num_channels;
  }
  if (num_cells > 0)
    parallel_for(num_tokens, num_channels, [&](int64_t begin, int64_t end) {
      AT_LEVEL(sum_frames(e, tokens_of(grad), begin, end));
    });

  const int64_t whole[] = {0, rows, cols, rows * cols, 1, 1};
  const int64_t cost = num_channels * (1 + 4 * num_tokens / (rows * cols));
  parallel_for(rows * cols, cost, [&](int64_t begin, int64_t end) {
    AT_LEVEL(gather_table(e, tokens_of(grad), Geometry{whole, 1}, grad_table.mutable_data_ptr(),
                          begin, end));
  });
  return grad_table;
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("add_pos_embed.native", TORCH_BOX(&add_pos_embed));
  library.impl("add_pos_embed_backward.native", TORCH_BOX(&add_pos_embed_backward));
}

}  // namespace patchpack
