// Kernels of patchpack.ops.merge_tokens for one level of the CPU: see level.h. What a pass over
// memory will want next is prefetched by one that computes.
#include "channel_sums.h"

namespace patchpack::LEVEL {

// Blocks `[begin, end)` of `out`, as they are.
inline void merge(const Copies& c, const char* x, int64_t stride, char* out, int64_t begin,
                  int64_t end) {
  for_blocks(c.blocks, x, stride, begin, end, [&](const BlockTokens<const char>& block) {
    char* to = out + block.n * c.blocks.area() * c.num_bytes;
    for (int64_t k = 0; k < c.blocks.area(); ++k)
      copy_bytes(to + k * c.num_bytes, block.x[k], c.num_bytes, c.past_caches);
  });
  fence();
}

// The other way round: rows `[begin, end)` of `grad`.
inline void split(const Copies& c, const char* grad, int64_t stride, char* grad_x, int64_t begin,
                  int64_t end) {
  for_blocks(c.blocks, grad_x, c.num_bytes, begin, end, [&](const BlockTokens<char>& block) {
    const char* from = grad + block.n * stride;
    for (int64_t k = 0; k < c.blocks.area(); ++k)
      copy_bytes(block.x[k], from + k * c.num_bytes, c.num_bytes, c.past_caches);
  });
  fence();
}

// One row of a LayerNorm, its tokens `x`, to `out`.
template <typename scalar_t>
inline void normalise(const Norm& norm, const scalar_t* const* x, double eps, bool past_caches,
                      scalar_t* out, float& mean, float& rstd) {
  const int64_t num_channels = norm.num_channels;
  const double count = (double)(norm.together * num_channels);
  double total = 0, squares = 0, rest = 0;  // the rest is what the first sum lost to rounding
  for (int64_t k = 0; k < norm.together; ++k) {
    add_sums(num_channels, [&](int64_t i, auto n, Floats* sums) { sums[0] += load(x[k] + i, n); },
             total);
  }
  const float about = (float)(total / count);
  for (int64_t k = 0; k < norm.together; ++k) {
    add_sums(num_channels, [&](int64_t i, auto n, Floats* sums) {
      const Floats centered = first_lanes_of(load(x[k] + i, n) - about, n);
      sums[0] += centered * centered;
      sums[1] += centered;
    }, squares, rest);
  }
  const float center = about + (float)(rest / count);
  const float scale = (float)(1.0 / std::sqrt(squares / count + eps));
  for (int64_t k = 0; k < norm.together; ++k) {
    const float *weight = norm.weight + k * num_channels, *bias = norm.bias + k * num_channels;
    scalar_t* y = out + k * num_channels;
    for_lanes_again(num_channels, [&](int64_t i, auto n) {
      const Floats z = (load(x[k] + i, n) - center) * scale;
      store(y + i, z * load(weight + i, n) + load(bias + i, n), n, past_caches);
    });
  }
  mean = center;
  rstd = scale;
}

// Blocks `[begin, end)` of `out`.
inline void merge_normalised(const Norm& norm, double eps, bool past_caches, void* out, float* mean,
                             float* rstd, int64_t begin, int64_t end) {
  with_scalar(norm.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const int64_t area = norm.blocks.area();
    const auto body = [&](const BlockTokens<const scalar_t>& block) {
      for (int64_t k = 0; k < area; k += norm.together) {
        const int64_t place = block.n * area + k, row = place / norm.together;
        normalise(norm, block.x + k, eps, past_caches,
                  (scalar_t*)out + place * norm.num_channels, mean[row], rstd[row]);
      }
    };
    for_blocks(norm.blocks, (const scalar_t*)norm.x, norm.stride_x, begin, end, body);
  });
  fence();
}

// The row of a LayerNorm that begins with token `first` of a block. With z = (x - mean) rstd and
// w = weight grad: grad_x = (w - mean(w) - z mean(w z)) rstd; grad z and grad are added to `sums`
// of weight and bias, `[2, together * num_channels]`.
template <typename scalar_t>
inline void normalise_backward(const Norm& norm, const NormGrad& g,
                               const BlockTokens<const scalar_t>& block, int64_t first,
                               float* sums) {
  const int64_t num_channels = norm.num_channels, size = norm.together * num_channels;
  const int64_t row = (block.n * norm.blocks.area() + first) / norm.together;
  const float mean = g.mean[row], rstd = g.rstd[row];
  const auto grad_of = [&](int64_t k) {
    return (const scalar_t*)g.grad + block.n * g.stride + (first + k) * num_channels;
  };
  const auto grad_x_of = [&](int64_t k) {
    return (scalar_t*)g.grad_x + block.tokens[first + k] * num_channels;
  };

  double total_w = 0, total_wz = 0;
  for (int64_t k = 0; k < norm.together; ++k) {
    const scalar_t *x = block.x[first + k], *grad = grad_of(k), *grad_x = grad_x_of(k);
    const float* weight = norm.weight + k * num_channels;
    add_sums(num_channels, [&](int64_t i, auto n, Floats* sums) {
      __builtin_prefetch(grad_x + i, 1, 2);
      const Floats w = load(grad + i, n) * load(weight + i, n);
      sums[0] += w;
      sums[1] += w * ((load(x + i, n) - mean) * rstd);
    }, total_w, total_wz);
  }
  const float mean_w = (float)(total_w / size), mean_wz = (float)(total_wz / size);
  for (int64_t k = 0; k < norm.together; ++k) {
    const scalar_t *x = block.x[first + k], *grad = grad_of(k);
    scalar_t* grad_x = grad_x_of(k);
    const float* weight = norm.weight + k * num_channels;
    float *sum_weight = sums + k * num_channels, *sum_bias = sum_weight + size;
    for_lanes(num_channels, [&](int64_t i, auto n) {
      __builtin_prefetch(x + block.ahead + i, 0, 2);
      __builtin_prefetch(grad + g.stride + i, 0, 2);
      const Floats dy = load(grad + i, n), w = dy * load(weight + i, n);
      const Floats z = (load(x + i, n) - mean) * rstd;
      store(grad_x + i, (w - mean_w - z * mean_wz) * rstd, n);
      store(sum_weight + i, load(sum_weight + i, n) + dy * z, n);
      store(sum_bias + i, load(sum_bias + i, n) + dy, n);
    });
  }
}

// Blocks `[begin, end)`, and their `sums`: of few rows first, then of those, so that errors stay few.
inline void merge_normalised_backward(const Norm& norm, const NormGrad& g, float* sums,
                                      int64_t begin, int64_t end) {
  constexpr int64_t kFew = 8;
  const int64_t size = 2 * norm.together * norm.num_channels;
  std::vector<float> few(size);
  std::fill_n(sums, size, 0.0f);
  int64_t count = 0;
  const auto flush = [&] {
    for (int64_t i = 0; i < size; ++i) sums[i] += few[i];
    std::fill(few.begin(), few.end(), 0.0f);
    count = 0;
  };
  with_scalar(norm.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto body = [&](const BlockTokens<const scalar_t>& block) {
      for (int64_t k = 0; k < norm.blocks.area(); k += norm.together) {
        normalise_backward(norm, g, block, k, few.data());
        if (++count == kFew) flush();
      }
    };
    for_blocks(norm.blocks, (const scalar_t*)norm.x, norm.stride_x, begin, end, body);
  });
  flush();
}

// Adds up columns `[begin, end)` of `rows`, which are `stride` apart.
inline void sum_columns(const float* rows, int64_t num_rows, int64_t stride, float* out,
                        int64_t begin, int64_t end) {
  std::vector<double> sums(end - begin);
  for (int64_t row = 0; row < num_rows; ++row)
    for (int64_t i = begin; i < end; ++i) sums[i - begin] += rows[row * stride + i];
  std::copy(sums.begin(), sums.end(), out + begin);
}

}  // namespace patchpack::LEVEL
