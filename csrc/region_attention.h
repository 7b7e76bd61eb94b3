// Kernels of patchpack.ops.region_attention for one level of the CPU: see level.h.
#include "sum_kernels.h"

namespace patchpack::LEVEL {

// out[c] = sum over the tokens k of a cell of `term(k, c, n)`: row by row, then the rows.
template <typename scalar_t, typename Term>
inline void sum_cell(int64_t region, int64_t num_channels, scalar_t* out, const Term& term) {
  const auto columns = [&](int64_t c, auto n, auto wide) {
    Floats total[wide] = {};
    for (int64_t row = 0; row < region; ++row) {
      Floats sums[wide] = {};
      for (int64_t k = row * region; k < (row + 1) * region; ++k)
        for (int i = 0; i < wide; ++i) sums[i] += term(k, c + i * kLanes, n);
      for (int i = 0; i < wide; ++i) total[i] += sums[i];
    }
    for (int i = 0; i < wide; ++i) store(out + c + i * kLanes, total[i], n);
  };
  constexpr std::integral_constant<int, 4> four;
  int64_t c = 0;
  for (; c + four * kLanes <= num_channels; c += four * kLanes) columns(c, All{}, four);
  for_lanes(num_channels - c, [&](int64_t i, auto n) {
    columns(c + i, n, std::integral_constant<int, 1>{});
  });
}

// `body(n, tokens, x)` for the cells `[begin, end)`, with the tokens of each and where they begin.
template <typename scalar_t, typename Body>
inline void for_cells(const Cells& cells, int64_t begin, int64_t end, const Body& body) {
  std::vector<const scalar_t*> x(cells.blocks.area());
  std::vector<int64_t> tokens(x.size());
  for_blocks(cells.blocks, begin, end, [&](int64_t n, const Block& block) {
    for (size_t k = 0; k < x.size(); ++k) {
      tokens[k] = block.token(k);
      x[k] = (const scalar_t*)cells.tokens + tokens[k] * cells.stride_tokens;
    }
    body(n, tokens.data(), x.data());
  });
}

inline void attend(const Cells& cells, void* out, float* p_out, int64_t begin, int64_t end) {
  with_scalar(cells.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const int64_t area = cells.blocks.area(), num_channels = cells.num_channels;
    const float share = 1.0f / (float)area;
    for_cells<scalar_t>(cells, begin, end, [&](int64_t cell, const int64_t*, auto x) {
      const scalar_t* q = (const scalar_t*)cells.query + cell * cells.stride_query;
      float* p = p_out + cell * area;  // at first scores
      float largest = -INFINITY;
      for (int64_t k = 0; k < area; ++k) {
        float score = 0.0f;
        add_sums(num_channels, [&](int64_t i, auto n, Floats* sums) {
          sums[0] += load(q + i, n) * load(x[k] + i, n);
        }, score);
        p[k] = score * cells.scale;
        largest = std::max(largest, p[k]);
      }
      double total = 0;
      for (int64_t k = 0; k < area; ++k) total += p[k] = std::exp(p[k] - largest);
      for (int64_t k = 0; k < area; ++k) p[k] /= (float)total;

      // y = sum_k (1 / r^2 + p[k]) x[k]
      sum_cell(cells.blocks.size, num_channels, (scalar_t*)out + cell * num_channels,
               [&](int64_t k, int64_t i, auto n) { return (share + p[k]) * load(x[k] + i, n); });
    });
  });
}

inline void attend_backward(const Cells& cells, const void* grad, int64_t stride_grad,
                            const float* p_in, void* grad_query, void* grad_tokens, int64_t begin,
                            int64_t end) {
  with_scalar(cells.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const int64_t region = cells.blocks.size, area = cells.blocks.area();
    const int64_t num_channels = cells.num_channels;
    const float share = 1.0f / (float)area;
    std::vector<float> mean(num_channels), grad_s(area);
    for_cells<scalar_t>(cells, begin, end, [&](int64_t cell, const int64_t* tokens, auto x) {
      const scalar_t* q = (const scalar_t*)cells.query + cell * cells.stride_query;
      const scalar_t* g = (const scalar_t*)grad + cell * stride_grad;
      const float* p = p_in + cell * area;

      // tokens are counted from their mean: neighbours are alike, and sums would cancel
      sum_cell(region, num_channels, mean.data(),
               [&](int64_t k, int64_t i, auto n) { return share * load(x[k] + i, n); });

      // grad_p[k] = grad . x[k], up to what all k share, which the softmax does not pass on
      // grad_s[k] = p[k] (grad_p[k] - sum_j p[j] grad_p[j]), here times scale
      double total = 0;
      for (int64_t k = 0; k < area; ++k) {
        float grad_p = 0.0f;
        add_sums(num_channels, [&](int64_t i, auto n, Floats* sums) {
          sums[0] += load(g + i, n) * (load(x[k] + i, n) - load(mean.data() + i, n));
        }, grad_p);
        grad_s[k] = grad_p;
        total += p[k] * grad_p;
      }
      for (int64_t k = 0; k < area; ++k)
        grad_s[k] = p[k] * (grad_s[k] - (float)total) * cells.scale;

      // grad_q = scale sum_k grad_s[k] x[k]; grad_x[k] = (1 / r^2 + p[k]) grad + scale grad_s[k] q
      sum_cell(region, num_channels, (scalar_t*)grad_query + cell * num_channels,
               [&](int64_t k, int64_t i, auto n) {
                 return grad_s[k] * (load(x[k] + i, n) - load(mean.data() + i, n));
               });
      for (int64_t k = 0; k < area; ++k) {
        scalar_t* out = (scalar_t*)grad_tokens + tokens[k] * num_channels;
        for_lanes_again(num_channels, [&](int64_t i, auto n) {
          store(out + i, (share + p[k]) * load(g + i, n) + grad_s[k] * load(q + i, n), n);
        });
      }
    });
  });
}

}  // namespace patchpack::LEVEL
