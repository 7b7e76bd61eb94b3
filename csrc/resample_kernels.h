// Weighted sums of tokens, once for each level. No include guard: see level.h.

namespace patchpack::LEVEL {

// `body(grid, row, begin, end)` for each row, or part of one, of the tokens `[begin, end)`. Rows are
// as wide as `width(grid)` says and counted through a grid's frames.
template <typename Width, typename Body>
inline void for_row_parts(const Geometry& geometry, int64_t begin, int64_t end, const Width& width,
                          const Body& body) {
  int64_t grid = geometry.find(begin);
  while (begin < end) {
    while (begin >= geometry.first(grid + 1)) ++grid;
    const int64_t in_grid = begin - geometry.first(grid), cols = width(grid);
    const int64_t row = in_grid / cols, col = in_grid % cols;
    const int64_t stop = std::min(cols, col + end - begin);
    body(grid, row, col, stop);
    begin += stop - col;
  }
}

// `sink(c, sum, n)` of every vector of the sum of `count` weighted sources.
template <typename scalar_t, typename Count, typename Sink>
inline void weighted_sum_of(const scalar_t* const* sources, const float* weights, Count count,
                            int64_t size, const Sink& sink) {
  constexpr int kWide = 4;
  int64_t c = 0;
  for (; c + kWide * kLanes <= size; c += kWide * kLanes) {
    Floats acc[kWide];
    for (int v = 0; v < kWide; ++v) acc[v] = weights[0] * load(sources[0] + c + v * kLanes);
    for (int64_t k = 1; k < count; ++k)
      for (int v = 0; v < kWide; ++v)
        acc[v] = fma(splat(weights[k]), load(sources[k] + c + v * kLanes), acc[v]);
    for (int v = 0; v < kWide; ++v) sink(c + v * kLanes, acc[v], All{});
  }
  for_lanes(size - c, [&](int64_t i, auto n) {
    Floats acc = weights[0] * load(sources[0] + c + i, n);
    for (int64_t k = 1; k < count; ++k)
      acc = fma(splat(weights[k]), load(sources[k] + c + i, n), acc);
    sink(c + i, acc, n);
  });
}

template <typename scalar_t, typename Sink>
inline void weighted_sum(const scalar_t* const* sources, const float* weights, int64_t count,
                         int64_t size, const Sink& sink) {
  switch (count) {
    case 0:
      return for_lanes(size, [&](int64_t c, auto n) { sink(c, Floats{}, n); });
    case 1:
      return weighted_sum_of(sources, weights, std::integral_constant<int, 1>{}, size, sink);
    case 2:
      return weighted_sum_of(sources, weights, std::integral_constant<int, 2>{}, size, sink);
    case 4:
      return weighted_sum_of(sources, weights, std::integral_constant<int, 4>{}, size, sink);
    default:
      return weighted_sum_of(sources, weights, count, size, sink);
  }
}

// What one token is the sum of.
template <typename scalar_t>
struct Terms {
  std::vector<const scalar_t*> sources;
  std::vector<float> weights;

  void clear() {
    sources.clear();
    weights.clear();
  }
  void add(const scalar_t* source, float weight) {
    sources.push_back(source);
    weights.push_back(weight);
  }
  template <typename Sink>
  void sum(int64_t size, const Sink& sink) const {
    weighted_sum(sources.data(), weights.data(), (int64_t)sources.size(), size, sink);
  }
};

// Makes parts of rows of resized maps, `num_channels` of each token.
template <typename scalar_t>
class RowResizer {
 public:
  explicit RowResizer(int64_t num_channels) : num_channels_(num_channels) {}

  // Columns `[begin, end)` of a row. The map's cells are at `source_at(row, col)`, and
  // `sink_of(col)` takes the vectors of a column.
  template <typename SourceAt, typename SinkOf>
  void operator()(const ResizeMatrix& rows, int64_t row, const ResizeMatrix& cols, int64_t begin,
                  int64_t end, const SourceAt& source_at, const SinkOf& sink_of) {
    if (rows.longest * cols.longest <= kFew)
      at_once(rows, row, cols, begin, end, source_at, sink_of);
    else
      rows_first(rows, row, cols, begin, end, source_at, sink_of);
  }

 private:
  static constexpr int64_t kFew = 9;  // terms of a token, up to which they are summed at once

  template <typename SourceAt, typename SinkOf>
  void at_once(const ResizeMatrix& rows, int64_t row, const ResizeMatrix& cols, int64_t begin,
               int64_t end, const SourceAt& source_at, const SinkOf& sink_of) {
    for (int64_t col = begin; col < end; ++col) {
      terms_.clear();
      for (const Entry* y = rows.begin(row); y != rows.end(row); ++y)
        for (const Entry* x = cols.begin(col); x != cols.end(col); ++x)
          terms_.add(source_at(y->index, x->index), y->weight * x->weight);
      terms_.sum(num_channels_, sink_of(col));
    }
  }

  // Sums rows of the map into one, then columns of that.
  template <typename SourceAt, typename SinkOf>
  void rows_first(const ResizeMatrix& rows, int64_t row, const ResizeMatrix& cols, int64_t begin,
                  int64_t end, const SourceAt& source_at, const SinkOf& sink_of) {
    const Entry *first = cols.begin(begin), *last = cols.begin(end) - 1;
    const int64_t left = first > last ? 0 : first->index;
    const int64_t width = first > last ? 0 : last->index + 1 - left;
    if ((int64_t)summed_.size() < width * num_channels_) summed_.resize(width * num_channels_);
    // columns that follow each other in memory are one long one
    const bool adjacent = width > 0 && source_at(0, left + width - 1) - source_at(0, left) ==
                                           (width - 1) * num_channels_;
    const int64_t step = adjacent ? width : 1;
    for (int64_t col = 0; col < width; col += step) {
      terms_.clear();
      for (const Entry* y = rows.begin(row); y != rows.end(row); ++y)
        terms_.add(source_at(y->index, left + col), y->weight);
      float* out = summed_.data() + col * num_channels_;
      terms_.sum(step * num_channels_, [&](int64_t c, Floats v, auto n) { store(out + c, v, n); });
    }
    for (int64_t col = begin; col < end; ++col) {
      summed_terms_.clear();
      for (const Entry* x = cols.begin(col); x != cols.end(col); ++x)
        summed_terms_.add(summed_.data() + (x->index - left) * num_channels_, x->weight);
      summed_terms_.sum(num_channels_, sink_of(col));
    }
  }

  int64_t num_channels_;
  std::vector<float> summed_;
  Terms<scalar_t> terms_;
  Terms<float> summed_terms_;
};

// The tokens of a frame's cells, counted from its first.
class CellTokens {
 public:
  void set(int64_t height, int64_t width, int64_t merge) {
    rows_.resize(height);
    cols_.resize(width);
    for (int64_t row = 0; row < height; ++row) rows_[row] = cell_to_token(row, 0, width, merge);
    for (int64_t col = 0; col < width; ++col) cols_[col] = cell_to_token(0, col, width, merge);
  }
  int64_t operator()(int64_t row, int64_t col) const { return rows_[row] + cols_[col]; }

 private:
  std::vector<int64_t> rows_, cols_;
};

}  // namespace patchpack::LEVEL
