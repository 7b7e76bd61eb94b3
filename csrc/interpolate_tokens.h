// Kernels of patchpack.ops.interpolate_tokens for one level of the CPU: see level.h.
#include "resample_kernels.h"

namespace patchpack::LEVEL {

// A part of a row of tokens that are made, and the frame it is made of.
struct RowPart {
  const ResizeMatrix &rows, &cols;
  int64_t row, begin, end;       // in the frame; its columns
  int64_t from_start, to_start;  // first token of the frame on either side
  const CellTokens &from_cell, &to_cell;
};

template <typename Body>
inline void for_parts(const Resize& r, int64_t begin, int64_t end, const Body& body) {
  const auto width = [&](int64_t grid) { return r.to.width(grid); };
  for_row_parts(r.to, begin, end, width,
                [&](int64_t grid, int64_t row, int64_t left, int64_t right) {
    const int64_t to_height = r.to.height(grid), frame = row / to_height;
    const int64_t from_area = r.from.height(grid) * r.from.width(grid);
    body(RowPart{*r.rows[grid], *r.cols[grid], row % to_height, left, right,
                 r.from.first(grid) + frame * from_area,
                 r.to.first(grid) + frame * to_height * r.to.width(grid), r.from_cells[grid],
                 r.to_cells[grid]});
  });
}

// Tokens `[begin, end)` of the result, counted by frame, row and column; also below.
inline void resize(const Resize& r, float* scales, int64_t begin, int64_t end) {
  with_scalar(r.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    RowResizer<scalar_t> resize_row(r.num_channels, false, r.past_caches);
    for_parts(r, begin, end, [&](const RowPart& p) {
      const scalar_t* x = (const scalar_t*)r.x + p.from_start * r.stride;
      scalar_t* out = (scalar_t*)r.out + p.to_start * r.num_channels;
      const auto source_at = [&](int64_t row, int64_t col) {
        return x + p.from_cell(row, col) * r.stride;
      };
      const auto out_at = [&](int64_t col) {
        return out + p.to_cell(p.row, col) * r.num_channels;
      };
      const auto done = [&](int64_t col) {
        if (scales)
          scales[p.to_start + p.to_cell(p.row, col)] = p.rows.scales[p.row] * p.cols.scales[col];
      };
      resize_row(p.rows, p.row, p.cols, p.begin, p.end, source_at, out_at, done);
    });
  });
  fence();
}

// Maxima, and where in the frame each of them was. The first one wins, and NaN wins over numbers.
inline void pool_max(const Resize& r, int32_t* argmax, int64_t begin, int64_t end) {
  with_scalar(r.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    std::vector<int64_t> window;
    for_parts(r, begin, end, [&](const RowPart& p) {
      const scalar_t* x = (const scalar_t*)r.x + p.from_start * r.stride;
      for (int64_t col = p.begin; col < p.end; ++col) {
        window.clear();
        for (const Entry* i = p.rows.begin(p.row); i != p.rows.end(p.row); ++i)
          for (const Entry* j = p.cols.begin(col); j != p.cols.end(col); ++j)
            window.push_back(p.from_cell(i->index, j->index));
        const int64_t to = (p.to_start + p.to_cell(p.row, col)) * r.num_channels;
        for_lanes(r.num_channels, [&](int64_t c, auto n) {
          Floats most = splat(-INFINITY);
          Ints place = Ints{} + (int32_t)window[0];
          for (const int64_t token : window) {
            const Floats v = load(x + token * r.stride + c, n);
            const Ints wins = (v > most) | (v != v);
            most = wins ? v : most;
            place = wins ? Ints{} + (int32_t)token : place;
          }
          store((scalar_t*)r.out + to + c, most, n);
          store((float*)argmax + to + c, (Floats)place, n);
        });
      }
    });
  });
}

// The gradient of every token, from the outputs whose maximum it was.
inline void pool_max_backward(const Resize& r, const int32_t* argmax, int64_t begin, int64_t end) {
  with_scalar(r.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    std::vector<int64_t> readers;
    for_parts(r, begin, end, [&](const RowPart& p) {
      for (int64_t col = p.begin; col < p.end; ++col) {
        readers.clear();
        for (const Entry* i = p.rows.begin(p.row); i != p.rows.end(p.row); ++i)
          for (const Entry* j = p.cols.begin(col); j != p.cols.end(col); ++j)
            readers.push_back(p.from_start + p.from_cell(i->index, j->index));
        const int64_t in_frame = p.to_cell(p.row, col);
        scalar_t* out = (scalar_t*)r.out + (p.to_start + in_frame) * r.num_channels;
        for_lanes(r.num_channels, [&](int64_t c, auto n) {
          Floats acc{};
          for (const int64_t token : readers) {
            const Floats grad = load((const scalar_t*)r.x + token * r.stride + c, n);
            const Ints place = (Ints)load((const float*)argmax + token * r.num_channels + c, n);
            acc += place == (int32_t)in_frame ? grad : Floats{};
          }
          store(out + c, acc, n);
        });
      }
    });
  });
}

}  // namespace patchpack::LEVEL
