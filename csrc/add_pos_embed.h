// Kernels of patchpack.ops.add_pos_embed for one level of the CPU: see level.h.
#include "resample_kernels.h"

namespace patchpack::LEVEL {

// Tokens `[begin, end)`, counted by row, column and frame: a cell goes with its first frame.
inline void add_embeddings(const PosEmbed& e, const Tokens& x, void* out_tokens, float* scales,
                           int64_t begin, int64_t end) {
  const auto width = [&](int64_t grid) {
    return e.geometry.width(grid) * num_frames(e.geometry, grid);
  };
  with_scalar(e.table_dtype, [&](auto table_scalar) {
    using table_t = decltype(table_scalar);
    const auto cell_at = [&](int64_t row, int64_t col) {
      return (const table_t*)e.table + row * e.stride_row + col * e.stride_col;
    };
    with_scalar(x.dtype, [&](auto scalar) {
      using scalar_t = decltype(scalar);
      const scalar_t* in = (const scalar_t*)x.data;
      scalar_t* out = (scalar_t*)out_tokens;
      RowResizer<table_t> resize_row(e.num_channels, false);
      std::vector<float> resized;
      for_row_parts(e.geometry, begin, end, width,
                    [&](int64_t grid, int64_t row, int64_t left, int64_t right) {
        const int64_t frames = num_frames(e.geometry, grid);
        const int64_t area = e.geometry.height(grid) * e.geometry.width(grid);
        const int64_t first = (left + frames - 1) / frames, last = (right + frames - 1) / frames;
        const auto token_at = [&](int64_t col) {
          return e.geometry.first(grid) + e.cells[grid](row, col);
        };
        const auto resize = [&](const auto& sink_of) {
          resize_row(*e.rows[grid], row, *e.cols[grid], first, last, cell_at, sink_of);
        };
        const auto add = [&](int64_t token, int64_t c, Floats v, auto n) {
          store(out + token * e.num_channels + c, load(in + token * x.stride + c, n) + v, n);
        };
        if (frames == 1) {
          resize([&](int64_t col) {
            const int64_t token = token_at(col);
            return [&add, token](int64_t c, Floats v, auto n) { add(token, c, v, n); };
          });
        } else {
          resized.resize((last - first) * e.num_channels);
          resize([&](int64_t col) {
            float* to = resized.data() + (col - first) * e.num_channels;
            return [to](int64_t c, Floats v, auto n) { store(to + c, v, n); };
          });
          for (int64_t frame = 0; frame < frames; ++frame)
            for (int64_t col = first; col < last; ++col) {
              const float* from = resized.data() + (col - first) * e.num_channels;
              const int64_t token = token_at(col) + frame * area;
              for_lanes(e.num_channels,
                        [&](int64_t c, auto n) { add(token, c, load(from + c, n), n); });
            }
        }
        if (scales)
          for (int64_t frame = 0; frame < frames; ++frame)
            for (int64_t col = first; col < last; ++col)
              scales[token_at(col) + frame * area] =
                  e.rows[grid]->scales[row] * e.cols[grid]->scales[col];
      });
    });
  });
}

// Kahan's sum: what is lost to rounding goes into the next term, however many there are.
inline void add_exactly(Floats& sum, Floats& lost, Floats term) {
  term -= lost;
  const Floats rounded = sum + term;
  lost = (rounded - sum) - term;
  lost = lost == lost ? lost : Floats{};  // nothing once the sum is infinite
  sum = rounded;
}

// The sum over its frames of each clip's gradient, tokens `[begin, end)` counted with the frames
// innermost.
inline void sum_frames(const PosEmbed& e, const Tokens& grad, int64_t begin, int64_t end) {
  const auto width = [&](int64_t grid) { return e.geometry.first(grid + 1) - e.geometry.first(grid); };
  with_scalar(grad.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    for_row_parts(e.geometry, begin, end, width,
                  [&](int64_t grid, int64_t, int64_t left, int64_t right) {
      const int64_t frames = num_frames(e.geometry, grid);
      if (frames == 1) return;
      const int64_t area = e.geometry.height(grid) * e.geometry.width(grid);
      const int64_t last = (right + frames - 1) / frames;
      for (int64_t cell = (left + frames - 1) / frames; cell < last; ++cell) {
        const scalar_t* in = (const scalar_t*)grad.data + (e.geometry.first(grid) + cell) * grad.stride;
        float* out = e.frame_sums[grid] + cell * e.num_channels;
        for_lanes(e.num_channels, [&](int64_t c, auto n) {
          Floats sum{}, lost{};
          for (int64_t frame = 0; frame < frames; ++frame)
            add_exactly(sum, lost, load(in + frame * area * grad.stride + c, n));
          store(out + c, sum, n);
        });
      }
    });
  });
}

// Cells `[begin, end)` of the gradient of the table, gathered from one image after the other.
inline void gather_table(const PosEmbed& e, const Tokens& grad, const Geometry& table,
                         void* grad_table, int64_t begin, int64_t end) {
  const auto width = [&](int64_t) { return table.width(0); };
  std::vector<float> sums, lost;
  with_scalar(grad.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    RowResizer<scalar_t> gather_image(e.num_channels, true);
    RowResizer<float> gather_clip(e.num_channels, true);
    for_row_parts(table, begin, end, width, [&](int64_t, int64_t row, int64_t left, int64_t right) {
      const int64_t size = (right - left) * e.num_channels;
      sums.assign(size, 0.0f);
      lost.assign(size, 0.0f);
      const auto sink_of = [&](int64_t col) {
        const int64_t offset = (col - left) * e.num_channels;
        float *sum_of = sums.data() + offset, *lost_of = lost.data() + offset;
        return [=](int64_t c, Floats v, auto n) {
          Floats sum = load(sum_of + c, n), rest = load(lost_of + c, n);
          add_exactly(sum, rest, v);
          store(sum_of + c, sum, n);
          store(lost_of + c, rest, n);
        };
      };
      for (int64_t grid = 0; grid < e.geometry.num_grids; ++grid) {
        if (e.rows[grid]->count(row) == 0) continue;
        const auto gather = [&](auto& resize_row, const auto* first, int64_t stride) {
          const auto token_at = [&](int64_t y, int64_t x) { return first + e.cells[grid](y, x) * stride; };
          resize_row(*e.rows[grid], row, *e.cols[grid], left, right, token_at, sink_of);
        };
        if (e.frame_sums[grid])
          gather(gather_clip, (const float*)e.frame_sums[grid], e.num_channels);
        else
          gather(gather_image, (const scalar_t*)grad.data + e.geometry.first(grid) * grad.stride,
                 grad.stride);
      }
      with_scalar(e.table_dtype, [&](auto table_scalar) {
        auto* out = (decltype(table_scalar)*)grad_table +
                    (row * table.width(0) + left) * e.num_channels;
        for_lanes(size, [&](int64_t c, auto n) { store(out + c, load(sums.data() + c, n), n); });
      });
    });
  });
}

}  // namespace patchpack::LEVEL
