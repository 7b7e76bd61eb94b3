// Weighted sums of tokens, once for each level. No include guard: see level.h.

namespace patchpack::LEVEL {

// `body(grid, row, begin, end)` for each row, or part of one, of the tokens `[begin, end)`. Rows
// are as wide as `width(grid)` says and counted through a grid's frames.
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

// What one token is the sum of.
template <typename scalar_t>
struct Terms {
  std::vector<const scalar_t*> sources;
  std::vector<float> weights;
  int64_t count = 0;

  // None, and room for so many.
  void clear(int64_t most) {
    if (most > (int64_t)sources.size()) {
      sources.resize(most);
      weights.resize(most);
    }
    count = 0;
  }
  void add(const scalar_t* source, float weight) {
    sources[count] = source;
    weights[count++] = weight;
  }
};

// The next for two columns of two rows, as bilinear maps have them, and most channels: returns
// how many. Columns are read one after the other, as they lie in memory, and brought nearer before.
template <typename scalar_t>
inline int64_t sum_four(const Terms<scalar_t>& terms, const Terms<scalar_t>& next, int64_t size,
                        scalar_t* out, bool past_caches) {
  constexpr int kStep = 2 * kLanes;
  const scalar_t *from[4], *ahead[4];
  Floats weights[4];
  for (int k = 0; k < 4; ++k) {
    from[k] = terms.sources[k];
    ahead[k] = k < next.count ? next.sources[k] : from[k];
    weights[k] = splat(terms.weights[k]);
  }
  const auto prefetch = [](const scalar_t* x) {
    for (int64_t byte = 0; byte < kStep * (int64_t)sizeof(scalar_t); byte += 64)
      __builtin_prefetch((const char*)x + byte, 0, 2);
  };
  alignas(64) float partial[2048];
  const int64_t whole = size / kStep * kStep;
  for (int64_t begin = 0, end; begin < whole; begin = end) {
    end = std::min<int64_t>(begin + std::size(partial), whole);
    for (int64_t c = begin; c < end; c += kStep) {
      prefetch(from[2] + c);
      prefetch(from[3] + c);
      const Pair upper = load_pair(from[0] + c), lower = load_pair(from[1] + c);
      for (int i = 0; i < 2; ++i)
        store(partial + c - begin + i * kLanes,
              fma(weights[1], lower.v[i], weights[0] * upper.v[i]));
    }
    for (int64_t c = begin; c < end; c += kStep) {
      prefetch(ahead[0] + c);
      prefetch(ahead[1] + c);
      const Pair upper = load_pair(from[2] + c), lower = load_pair(from[3] + c);
      Pair sum;
      for (int i = 0; i < 2; ++i) {
        const Floats left = load(partial + c - begin + i * kLanes);
        sum.v[i] = fma(weights[3], lower.v[i], fma(weights[2], upper.v[i], left));
      }
      store_pair(out + c, sum, past_caches);
    }
  }
  return whole;
}

// The sum of `size` channels of all terms. Those of `next` are brought nearer meanwhile: the CPU's
// own prefetcher does not see them coming.
template <typename scalar_t, typename out_t>
inline void sum_terms(const Terms<scalar_t>& terms, const Terms<scalar_t>& next, int64_t size,
                      out_t* out, bool past_caches = false) {
  const int64_t count = terms.count;
  if (count == 0) return for_lanes(size, [&](int64_t c, auto n) { store(out + c, Floats{}, n); });
  int64_t c = 0;
  if constexpr (std::is_same_v<scalar_t, out_t>)
    if (count == 4) c = sum_four(terms, next, size, out, past_caches);
  constexpr int kWide = 4;  // vectors at a time
  constexpr int64_t kWideBytes = kWide * kLanes * sizeof(scalar_t);
  const scalar_t* const* sources = terms.sources.data();
  const float* weights = terms.weights.data();
  for (; c + kWide * kLanes <= size; c += kWide * kLanes) {
    for (int64_t k = 0; k < next.count; ++k)
      for (int64_t byte = 0; byte < kWideBytes; byte += 64)
        __builtin_prefetch((const char*)(next.sources[k] + c) + byte, 0, 2);
    Floats acc[kWide];
    for (int v = 0; v < kWide; ++v) acc[v] = weights[0] * load(sources[0] + c + v * kLanes);
    for (int64_t k = 1; k < count; ++k)
      for (int v = 0; v < kWide; ++v)
        acc[v] = fma(splat(weights[k]), load(sources[k] + c + v * kLanes), acc[v]);
    for (int v = 0; v < kWide; ++v) store(out + c + v * kLanes, acc[v], All{}, past_caches);
  }
  for_lanes(size - c, [&](int64_t i, auto n) {
    Floats acc = weights[0] * load(sources[0] + c + i, n);
    for (int64_t k = 1; k < count; ++k)
      acc = fma(splat(weights[k]), load(sources[k] + c + i, n), acc);
    store(out + c + i, acc, n);
  });
}

// Makes parts of rows of resized maps, `num_channels` of each token.
template <typename scalar_t>
class RowResizer {
 public:
  // Columns that nothing is summed for get zeros, or are left out.
  RowResizer(int64_t num_channels, bool skip_empty, bool past_caches = false)
      : num_channels_(num_channels), skip_empty_(skip_empty), past_caches_(past_caches) {}

  // Columns `[begin, end)` of a row. The map's cells are at `source_at(row, col)`, a column goes to
  // `out_at(col)`, and then `done(col)` is called.
  template <typename SourceAt, typename OutAt, typename Done>
  void operator()(const ResizeMatrix& rows, int64_t row, const ResizeMatrix& cols, int64_t begin,
                  int64_t end, const SourceAt& source_at, const OutAt& out_at,
                  const Done& done) {
    if (rows.longest * cols.longest <= kFew)
      at_once(rows, row, cols, begin, end, source_at, out_at, done);
    else
      rows_first(rows, row, cols, begin, end, source_at, out_at, done);
  }

 private:
  static constexpr int64_t kFew = 9;  // terms of a token, up to which they are summed at once

  template <typename SourceAt, typename OutAt, typename Done>
  void at_once(const ResizeMatrix& rows, int64_t row, const ResizeMatrix& cols, int64_t begin,
               int64_t end, const SourceAt& source_at, const OutAt& out_at,
                  const Done& done) {
    const auto find_terms = [&](int64_t row, int64_t col) {
      next_.clear(rows.longest * cols.longest);
      for (const Entry* x = cols.begin(col); x != cols.end(col); ++x)
        for (const Entry* y = rows.begin(row); y != rows.end(row); ++y)
          next_.add(source_at(y->index, x->index), y->weight * x->weight);
    };
    find_terms(row, begin);
    for (int64_t col = begin; col < end; ++col) {
      std::swap(terms_, next_);
      if (col + 1 < end)
        find_terms(row, col + 1);
      else
        find_terms(std::min(row + 1, rows.count() - 1), 0);  // likely the next
      if (skip_empty_ && terms_.count == 0) continue;
      sum_terms(terms_, next_, num_channels_, out_at(col), past_caches_);
      done(col);
    }
  }

  // Sums rows of the map into one, then columns of that.
  template <typename SourceAt, typename OutAt, typename Done>
  void rows_first(const ResizeMatrix& rows, int64_t row, const ResizeMatrix& cols, int64_t begin,
                  int64_t end, const SourceAt& source_at, const OutAt& out_at,
                  const Done& done) {
    int64_t left = INT32_MAX, right = 0;  // columns that are read
    for (const Entry* x = cols.begin(begin); x != cols.begin(end); ++x) {
      left = std::min<int64_t>(left, x->index);
      right = std::max<int64_t>(right, x->index + 1);
    }
    const int64_t width = std::max<int64_t>(right - left, 0);
    if ((int64_t)summed_.size() < width * num_channels_) summed_.resize(width * num_channels_);
    // columns that follow each other in memory are one long one
    const bool adjacent = width > 0 && source_at(0, left + width - 1) - source_at(0, left) ==
                                           (width - 1) * num_channels_;
    const int64_t step = adjacent ? width : 1;
    for (int64_t col = 0; col < width; col += step) {
      terms_.clear(rows.longest);
      for (const Entry* y = rows.begin(row); y != rows.end(row); ++y)
        terms_.add(source_at(y->index, left + col), y->weight);
      sum_terms(terms_, {}, step * num_channels_, summed_.data() + col * num_channels_);
    }
    for (int64_t col = begin; col < end; ++col) {
      if (skip_empty_ && cols.count(col) == 0) continue;
      summed_terms_.clear(cols.longest);
      for (const Entry* x = cols.begin(col); x != cols.end(col); ++x)
        summed_terms_.add(summed_.data() + (x->index - left) * num_channels_, x->weight);
      sum_terms(summed_terms_, {}, num_channels_, out_at(col), past_caches_);
      done(col);
    }
  }

  int64_t num_channels_;
  bool skip_empty_, past_caches_;
  std::vector<float> summed_;
  Terms<scalar_t> terms_, next_;
  Terms<float> summed_terms_;
};

}  // namespace patchpack::LEVEL
