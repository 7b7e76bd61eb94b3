// Kernels of patchpack.ops.add_pos_embed for one level of the CPU: see level.h.
#include "resample_kernels.h"

namespace patchpack::LEVEL {

// Adds an embedding to its token in each of `frames` frames of `area` tokens.
template <typename scalar_t>
inline void add_to_frames(const float* embedding, const Tokens& x, scalar_t* out, int64_t token,
                          int64_t frames, int64_t area, int64_t num_channels, bool past_caches) {
  for (int64_t frame = 0; frame < frames; ++frame, token += area) {
    const scalar_t* from = (const scalar_t*)x.data + token * x.stride;
    scalar_t* to = out + token * num_channels;
    for_lanes(num_channels, [&](int64_t c, auto n) {
      store(to + c, load(from + c, n) + load(embedding + c, n), n, past_caches);
    });
  }
}

// Tokens `[begin, end)`, counted by image row, column and frame: a cell goes with its first frame.
inline void add_embeddings(const PosEmbed& e, const Tokens& x, void* out, float* scales,
                           int64_t begin, int64_t end) {
  std::vector<float> embedding(e.num_channels);
  const auto after = std::upper_bound(e.image_rows.begin(), e.image_rows.end(), begin,
                                      [](int64_t token, const ImageRow& r) {
                                        return token < r.begin;
                                      });
  with_scalar(e.table_dtype, [&](auto table_scalar) {
    using table_t = decltype(table_scalar);
    const auto cell_at = [&](int64_t row, int64_t col) {
      return (const table_t*)e.table + row * e.stride_row + col * e.stride_col;
    };
    RowResizer<table_t> resize_row(e.num_channels, false);
    for (auto r = after - 1; r->begin < end; ++r) {
      const int64_t grid = r->grid, row = r->row, frames = num_frames(e.geometry, grid);
      const int64_t area = e.geometry.height(grid) * e.geometry.width(grid);
      const ResizeMatrix &rows = *e.rows[grid], &cols = *e.cols[grid];
      const auto add = [&](int64_t col) {
        const int64_t token = e.geometry.first(grid) + e.cells[grid](row, col);
        with_scalar(x.dtype, [&](auto scalar) {
          add_to_frames(embedding.data(), x, (decltype(scalar)*)out, token, frames, area,
                        e.num_channels, e.past_caches);
        });
        for (int64_t frame = 0; scales && frame < frames; ++frame)
          scales[token + frame * area] = rows.scales[row] * cols.scales[col];
      };
      const auto first_cell = [&](int64_t token) {
        return (token - r->begin + frames - 1) / frames;
      };
      resize_row(rows, row, cols, first_cell(std::max(begin, r->begin)),
                 first_cell(std::min(end, (r + 1)->begin)), cell_at,
                 [&](int64_t) { return embedding.data(); }, add);
    }
  });
  fence();
}

// Kahan's sum: what is lost to rounding goes into the next term, however many there are.
inline void add_exactly(Floats& sum, Floats& lost, Floats term) {
  term -= lost;
  const Floats after = sum + term;
  lost = (after - sum) - term;
  lost = lost == lost ? lost : Floats{};  // nothing once the sum is infinite
  sum = after;
}

// The sum over its frames of each clip's gradient, tokens `[begin, end)` counted with the frames
// innermost.
inline void sum_frames(const PosEmbed& e, const Tokens& grad, int64_t begin, int64_t end) {
  const auto width = [&](int64_t grid) {
    return e.geometry.first(grid + 1) - e.geometry.first(grid);
  };
  with_scalar(grad.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    for_row_parts(e.geometry, begin, end, width,
                  [&](int64_t grid, int64_t, int64_t left, int64_t right) {
      const int64_t frames = num_frames(e.geometry, grid), last = (right + frames - 1) / frames;
      const int64_t stride = e.geometry.height(grid) * e.geometry.width(grid) * grad.stride;
      if (frames == 1) return;
      for (int64_t cell = (left + frames - 1) / frames; cell < last; ++cell) {
        const int64_t token = e.geometry.first(grid) + cell;
        const scalar_t* in = (const scalar_t*)grad.data + token * grad.stride;
        float* out = e.frame_sums[grid] + cell * e.num_channels;
        for_lanes(e.num_channels, [&](int64_t c, auto n) {
          Floats sum{}, lost{};
          for (int64_t frame = 0; frame < frames; ++frame)
            add_exactly(sum, lost, load(in + frame * stride + c, n));
          store(out + c, sum, n);
        });
      }
    });
  });
}

// Cells `[begin, end)` of the gradient of the table, gathered from one image after the other.
inline void gather_table(const PosEmbed& e, const Tokens& grad, const Geometry& table,
                         void* grad_table, int64_t begin, int64_t end) {
  constexpr int64_t kGroup = 16;  // images summed before they meet the total, which rounds less
  std::vector<float> total, group, of_image(e.num_channels);
  const auto width = [&](int64_t) { return table.width(0); };
  with_scalar(grad.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    RowResizer<scalar_t> gather_image(e.num_channels, true);
    RowResizer<float> gather_clip(e.num_channels, true);
    for_row_parts(table, begin, end, width, [&](int64_t, int64_t row, int64_t left, int64_t right) {
      const int64_t size = (right - left) * e.num_channels;
      total.assign(size, 0.0f);
      group.assign(size, 0.0f);
      const auto add = [&](int64_t col) {
        float* sum = group.data() + (col - left) * e.num_channels;
        for_lanes(e.num_channels, [&](int64_t c, auto n) {
          store(sum + c, load(sum + c, n) + load(of_image.data() + c, n), n);
        });
      };
      const auto add_group = [&] {
        for_lanes(size, [&](int64_t c, auto n) {
          store(total.data() + c, load(total.data() + c, n) + load(group.data() + c, n), n);
          store(group.data() + c, Floats{}, n);
        });
      };
      int64_t num_images = 0;
      for (int64_t grid = 0; grid < e.geometry.num_grids; ++grid) {
        if (e.rows[grid]->count(row) == 0) continue;
        if (++num_images % kGroup == 0) add_group();
        const auto gather = [&](auto& resize_row, const auto* first, int64_t stride) {
          resize_row(*e.rows[grid], row, *e.cols[grid], left, right,
                     [&](int64_t y, int64_t x) { return first + e.cells[grid](y, x) * stride; },
                     [&](int64_t) { return of_image.data(); }, add);
        };
        if (e.frame_sums[grid])
          gather(gather_clip, (const float*)e.frame_sums[grid], e.num_channels);
        else
          gather(gather_image, (const scalar_t*)grad.data + e.geometry.first(grid) * grad.stride,
                 grad.stride);
      }
      add_group();
      with_scalar(e.table_dtype, [&](auto table_scalar) {
        auto* out = (decltype(table_scalar)*)grad_table +
                    (row * table.width(0) + left) * e.num_channels;
        for_lanes(size, [&](int64_t c, auto n) { store(out + c, load(total.data() + c, n), n); });
      });
    });
  });
}

}  // namespace patchpack::LEVEL
