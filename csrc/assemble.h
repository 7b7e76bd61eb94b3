// Kernels of patchpack.ops.assemble for one level of the CPU: see level.h.
#include "resample_kernels.h"

namespace patchpack::LEVEL {

// Tokens `[begin, end)` of the sequence, and which vectors they are, or -1.
inline void assemble(const Layout& layout, const Rows& tokens, const Rows& vectors, char* out,
                     int32_t* labels, int64_t begin, int64_t end) {
  const auto begin_of = [&](int64_t part) { return layout.parts[part].begin; };
  with_scalar(layout.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    RowResizer<scalar_t> resize_row(tokens.num_channels, false, layout.past_caches);
    int64_t i = find_place(layout.num_parts, begin, begin_of);
    while (begin < end) {
      while (begin >= begin_of(i + 1)) ++i;
      const Part& part = layout.parts[i];
      const int64_t row = (begin - part.begin) / part.row_length();
      const int64_t left = (begin - part.begin) % part.row_length();
      const int64_t stop = std::min(part.row_length(), left + end - begin);
      const int64_t right = std::min(stop, part.cols);
      const auto out_at = [&](int64_t col) {
        return (scalar_t*)(out + (begin - left + col) * tokens.num_bytes);
      };
      const auto source_at = [&](int64_t y, int64_t x) {
        return (const scalar_t*)tokens.at(part.token_at(y, x));
      };
      if (part.is_resized() && left < right) {
        resize_row(*layout.rows[i], row, *layout.cols[i], left, right, source_at, out_at,
                   [](int64_t) {});
      } else {
        for (int64_t col = left; col < right; ++col)
          copy_bytes(out_at(col), source_at(row, col), tokens.num_bytes, layout.past_caches);
      }
      if (stop > part.cols)
        std::memcpy(out_at(part.cols), vectors.at(part.newline), tokens.num_bytes);
      if (labels)
        for (int64_t col = left; col < stop; ++col)
          labels[begin - left + col] = col < part.cols ? -1 : (int32_t)part.newline;
      begin += stop - left;
    }
  });
  fence();
}

// The gradient of tokens `[begin, end)`, a row of a tile at a time, from all that read them.
inline void assemble_backward(const Layout& layout, const Rows& grad, char* out, int64_t begin,
                              int64_t end) {
  const auto first_of = [&](int64_t map) { return layout.maps[map].first; };
  with_scalar(layout.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    RowResizer<scalar_t> resize_row(grad.num_channels, false, layout.past_caches);
    int64_t i = find_place(layout.num_maps, begin, first_of);
    while (begin < end) {
      while (i + 1 < layout.num_maps && begin >= first_of(i + 1)) ++i;
      const Map& map = layout.maps[i];
      const auto out_at = [&](int64_t token) { return out + token * grad.num_bytes; };
      const auto clear = [&](int64_t to) {
        if (begin >= to) return;
        std::memset(out_at(begin), 0, (to - begin) * grad.num_bytes);
        begin = to;
      };
      const int64_t next = i + 1 < layout.num_maps ? first_of(i + 1) : end;
      const int64_t in_map = begin - map.first;
      if (in_map < 0 || in_map >= map.num_tokens) {  // of no map
        clear(std::min(end, in_map < 0 ? map.first : next));
        continue;
      }
      const Part& part = layout.parts[map.part];
      const int64_t tile = in_map / (part.tile_rows * part.tile_cols);
      const int64_t in_tile = in_map % (part.tile_rows * part.tile_cols);
      const int64_t row = tile / part.across * part.tile_rows + in_tile / part.tile_cols - part.top;
      const int64_t tile_left = tile % part.across * part.tile_cols - part.left;
      const int64_t col = tile_left + in_tile % part.tile_cols;
      const int64_t start = begin - col;  // the token of column 0, were it in this tile
      const int64_t stop = std::min(end, start + tile_left + part.tile_cols);
      if (row < 0 || row >= part.height) {  // cropped
        clear(stop);
        continue;
      }
      clear(std::min(stop, start));
      const int64_t left = begin - start, right = std::min(stop - start, part.width);
      const auto source_at = [&](int64_t y, int64_t x) {
        return (const scalar_t*)grad.at(part.begin + y * part.row_length() + x);
      };
      if (part.is_resized() && left < right) {
        const auto column_at = [&](int64_t c) { return (scalar_t*)out_at(start + c); };
        resize_row(*layout.rows[map.part], row, *layout.cols[map.part], left, right, source_at,
                   column_at, [](int64_t) {});
      } else {
        for (int64_t c = left; c < right; ++c)
          copy_bytes(out_at(start + c), source_at(row, c), grad.num_bytes, layout.past_caches);
      }
      begin = std::max(begin, start + right);
      clear(stop);
    }
  });
  fence();
}

}  // namespace patchpack::LEVEL
