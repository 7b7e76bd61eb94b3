// Resizing maps of packed images; the maths is in patchpack.reference.interpolate_tokens.
#include "past_caches.h"
#include "resample_tables.h"

namespace patchpack {
namespace {

// Tokens `x` of maps `from` make tokens `out` of maps `to`: the result, or with transposed matrices
// the gradient. Matrices are those of each grid.
struct Resize {
  ScalarType dtype;
  const void* x;
  void* out;
  int64_t num_channels, stride;
  bool past_caches;
  Geometry from, to;
  std::vector<CellTokens> from_cells, to_cells;
  std::vector<const ResizeMatrix*> rows, cols;
};

}  // namespace
}  // namespace patchpack

#define KERNELS "interpolate_tokens.h"
#include "foreach_level.h"

namespace patchpack {
namespace {

void set_matrices(Resize& r, ResizeMatrices& matrices, const Geometry& in, const Geometry& out) {
  for (int64_t grid = 0; grid < in.num_grids; ++grid) {
    r.rows.push_back(matrices.of(in.height(grid), out.height(grid)));
    r.cols.push_back(matrices.of(in.width(grid), out.width(grid)));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> interpolate_tokens(Tensor x, Tensor geometry, Tensor target_geometry,
                                              int64_t num_tokens, int64_t merge,
                                              int64_t target_merge, std::string mode,
                                              bool align_corners, bool antialias) {
  const Filter filter = filter_of(mode, align_corners, antialias);
  const bool max = filter.mode == ResampleMode::max;
  x = last_contiguous(x);
  const int64_t num_channels = x.size(1);
  const Tensor out = empty({num_tokens, num_channels}, x.scalar_type());
  const Tensor saved = max ? empty({num_tokens, num_channels}, ScalarType::Int)
                           : empty({filter.normalised() ? num_tokens : 0}, ScalarType::Float);

  Resize r{x.scalar_type(), x.const_data_ptr(), out.mutable_data_ptr(), num_channels, x.stride(0),
           past_caches(x, out), geometry_of(geometry), geometry_of(target_geometry), {}, {}, {},
           {}};
  r.from_cells = cell_tokens(r.from, merge);
  r.to_cells = cell_tokens(r.to, target_merge);
  ResizeMatrices matrices(filter, false);
  set_matrices(r, matrices, r.from, r.to);
  float* scales = filter.normalised() ? saved.mutable_data_ptr<float>() : nullptr;
  parallel_for(num_tokens, 4 * num_channels, [&](int64_t begin, int64_t end) {
    if (max)
      AT_LEVEL(pool_max(r, saved.mutable_data_ptr<int32_t>(), begin, end));
    else
      AT_LEVEL(resize(r, scales, begin, end));
  });
  return {out, saved};
}

Tensor interpolate_tokens_backward(Tensor grad, Tensor saved, Tensor geometry,
                                   Tensor target_geometry, int64_t num_tokens, int64_t merge,
                                   int64_t target_merge, std::string mode, bool align_corners,
                                   bool antialias) {
  const Filter filter = filter_of(mode, align_corners, antialias);
  grad = last_contiguous(grad);
  const int64_t num_channels = grad.size(1);
  const Tensor grad_x = empty({num_tokens, num_channels}, grad.scalar_type());

  Resize r{grad.scalar_type(), grad.const_data_ptr(), grad_x.mutable_data_ptr(), num_channels,
           grad.stride(0), past_caches(grad, grad_x), geometry_of(target_geometry),
           geometry_of(geometry), {}, {}, {}, {}};
  r.from_cells = cell_tokens(r.from, target_merge);
  r.to_cells = cell_tokens(r.to, merge);
  ResizeMatrices matrices(filter, true);
  set_matrices(r, matrices, r.to, r.from);
  parallel_for(num_tokens, 4 * num_channels, [&](int64_t begin, int64_t end) {
    if (filter.mode == ResampleMode::max)
      AT_LEVEL(pool_max_backward(r, saved.const_data_ptr<int32_t>(), begin, end));
    else
      AT_LEVEL(resize(r, nullptr, begin, end));
  });
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("interpolate_tokens.native", TORCH_BOX(&interpolate_tokens));
  library.impl("interpolate_tokens_backward.native", TORCH_BOX(&interpolate_tokens_backward));
}

}  // namespace patchpack
