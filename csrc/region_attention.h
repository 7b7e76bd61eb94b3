// Kernels of patchpack.ops.region_attention for one level of the CPU: see level.h. What a pass over
// memory will want next is prefetched by one that computes.
#include "sum_kernels.h"

namespace patchpack::LEVEL {

// out[c] = sum of `term(k, c, n)` over the tokens k of a cell: along its rows, then over eight rows
// and over eights, so that rounding errors stay few.
template <typename scalar_t, typename Term>
inline void sum_cell(const Cells& cells, scalar_t* out, const Term& term) {
  const int64_t region = cells.blocks.size, num_channels = cells.num_channels;
  const auto columns = [&](int64_t c, auto n, auto wide) {
    const auto add_rows = [&](int64_t row, int64_t end, Floats* total) {
      for (; row < end; ++row) {
        Floats sums[wide] = {};
        for (int64_t k = row * region; k < (row + 1) * region; ++k)
          for (int i = 0; i < wide; ++i) sums[i] += term(k, c + i * kLanes, n);
        for (int i = 0; i < wide; ++i) total[i] += sums[i];
      }
    };
    Floats total[wide] = {};
    add_rows(0, std::min<int64_t>(8, region), total);
    for (int64_t row = 8; row < region; row += 8) {
      Floats rows[wide] = {};
      add_rows(row, std::min(row + 8, region), rows);
      for (int i = 0; i < wide; ++i) total[i] += rows[i];
    }
    for (int i = 0; i < wide; ++i) store(out + c + i * kLanes, total[i], n);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 4> four;
  int64_t c = 0;
  for (; c + four * kLanes <= num_channels; c += four * kLanes) columns(c, All{}, four);
  for_lanes(num_channels - c, [&](int64_t i, auto n) { columns(c + i, n, one); });
}

template <typename scalar_t>
inline void attend_cell(const Cells& cells, const BlockTokens<const scalar_t>& cell,
                        const scalar_t* q, float* p, scalar_t* out) {
  const int64_t area = cells.blocks.area();
  float largest = -INFINITY;
  for (int64_t k = 0; k < area; ++k) {
    const scalar_t* x = cell.x[k];
    float score = 0.0f;
    add_sums(cells.num_channels, [&](int64_t i, auto n, Floats* sums) {
      sums[0] += load(q + i, n) * load(x + i, n);
    }, score);
    p[k] = score * cells.scale;
    largest = std::max(largest, p[k]);
  }
  double total = 0;
  for (int64_t k = 0; k < area; ++k) total += p[k] = std::exp(p[k] - largest);
  for (int64_t k = 0; k < area; ++k) p[k] /= (float)total;

  // y = sum_k (1 / r^2 + p[k]) x[k]
  const float share = 1.0f / (float)area;
  sum_cell(cells, out, [&](int64_t k, int64_t i, auto n) {
    __builtin_prefetch(cell.x[k] + cell.ahead + i, 0, 2);
    return (share + p[k]) * load(cell.x[k] + i, n);
  });
}

// Tokens are counted from their `mean`: neighbours are alike, and sums would cancel.
template <typename scalar_t>
inline void attend_cell_backward(const Cells& cells, const BlockTokens<const scalar_t>& cell,
                                 const scalar_t* grad, const scalar_t* q, const float* p,
                                 float* mean, float* grad_s, scalar_t* grad_query,
                                 scalar_t* grad_tokens) {
  const int64_t area = cells.blocks.area(), num_channels = cells.num_channels;
  const float share = 1.0f / (float)area;
  sum_cell(cells, mean, [&](int64_t k, int64_t i, auto n) {
    return share * load(cell.x[k] + i, n);
  });

  // grad_p[k] = grad . x[k], up to what all k share, which the softmax does not pass on
  double total = 0;
  for (int64_t k = 0; k < area; ++k) {
    const scalar_t* x = cell.x[k];
    float grad_p = 0.0f;
    const scalar_t* grad_x = grad_tokens + cell.tokens[k] * num_channels;
    add_sums(num_channels, [&](int64_t i, auto n, Floats* sums) {
      __builtin_prefetch(grad_x + i, 1, 2);
      sums[0] += load(grad + i, n) * (load(x + i, n) - load(mean + i, n));
    }, grad_p);
    grad_s[k] = grad_p;
    total += p[k] * grad_p;
  }

  // grad_s[k] = p[k] (grad_p[k] - sum_j p[j] grad_p[j]), here times scale
  for (int64_t k = 0; k < area; ++k)
    grad_s[k] = p[k] * (grad_s[k] - (float)total) * cells.scale;

  // grad_q = scale sum_k grad_s[k] x[k]; grad_x[k] = (1 / r^2 + p[k]) grad + scale grad_s[k] q
  sum_cell(cells, grad_query, [&](int64_t k, int64_t i, auto n) {
    return grad_s[k] * (load(cell.x[k] + i, n) - load(mean + i, n));
  });
  for (int64_t k = 0; k < area; ++k) {
    scalar_t* grad_x = grad_tokens + cell.tokens[k] * num_channels;
    const scalar_t* next = cell.x[k] + cell.ahead;
    for_lanes_again(num_channels, [&](int64_t i, auto n) {
      __builtin_prefetch(next + i, 0, 2);
      store(grad_x + i, (share + p[k]) * load(grad + i, n) + grad_s[k] * load(q + i, n), n);
    });
  }
}

// Cells `[begin, end)`.
inline void attend(const Cells& cells, void* out, float* p, int64_t begin, int64_t end) {
  with_scalar(cells.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto body = [&](const BlockTokens<const scalar_t>& cell) {
      attend_cell(cells, cell, (const scalar_t*)cells.query + cell.n * cells.stride_query,
                  p + cell.n * cells.blocks.area(), (scalar_t*)out + cell.n * cells.num_channels);
    };
    for_blocks(cells.blocks, (const scalar_t*)cells.tokens, cells.stride_tokens, begin, end, body);
  });
}

// Cells `[begin, end)`.
inline void attend_backward(const Cells& cells, const void* grad, int64_t stride_grad,
                            const float* p, void* grad_query, void* grad_tokens, int64_t begin,
                            int64_t end) {
  std::vector<float> mean(cells.num_channels), grad_s(cells.blocks.area());
  with_scalar(cells.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto body = [&](const BlockTokens<const scalar_t>& cell) {
      attend_cell_backward(cells, cell, (const scalar_t*)grad + cell.n * stride_grad,
                           (const scalar_t*)cells.query + cell.n * cells.stride_query,
                           p + cell.n * cells.blocks.area(), mean.data(), grad_s.data(),
                           (scalar_t*)grad_query + cell.n * cells.num_channels,
                           (scalar_t*)grad_tokens);
    };
    for_blocks(cells.blocks, (const scalar_t*)cells.tokens, cells.stride_tokens, begin, end, body);
  });
}

}  // namespace patchpack::LEVEL
