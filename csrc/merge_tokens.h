// Kernels of patchpack.ops.merge_tokens for one level of the CPU: see level.h.
#include "sum_kernels.h"

namespace patchpack::LEVEL {

// One row of a LayerNorm, the tokens `x` of it, to `out`.
template <typename scalar_t>
inline void normalise(const Norm& norm, const scalar_t* const* x, int64_t ahead, double eps,
                      scalar_t* out, float& mean_out, float& rstd_out) {
  const int64_t num_channels = norm.num_channels;
  const double count = (double)(norm.together * num_channels);
  double total = 0, squares = 0, rest = 0;  // the rest is what rounding lost of the mean
  for (int64_t k = 0; k < norm.together; ++k)
    add_sums(num_channels, [&](int64_t i, auto n, Floats* sums) { sums[0] += load(x[k] + i, n); },
             total);
  const float about = (float)(total / count);
  for (int64_t k = 0; k < norm.together; ++k)
    add_sums(num_channels, [&](int64_t i, auto n, Floats* sums) {
      const Floats centered = first(load(x[k] + i, n) - about, n);
      sums[0] += centered * centered;
      sums[1] += centered;
    }, squares, rest);
  const float mean = about + (float)(rest / count);
  const float rstd = (float)(1.0 / std::sqrt(squares / count + eps));
  const float *weight = norm.weight, *bias = norm.bias;
  for (int64_t k = 0; k < norm.together; ++k) {
    for_lanes_again(num_channels, [&](int64_t i, auto n) {
      const Floats z = (load(x[k] + i, n) - mean) * rstd;
      store(out + i, z * load(weight + i, n) + load(bias + i, n), n);
    });
    weight += num_channels, bias += num_channels, out += num_channels;
  }
  mean_out = mean, rstd_out = rstd;
}

// Blocks `[begin, end)` of the output.
inline void merge_normalised(const Norm& norm, double eps, void* out, float* mean, float* rstd,
                             int64_t begin, int64_t end) {
  with_scalar(norm.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const int64_t area = norm.blocks.area();
    const auto body = [&](const Found<scalar_t>& block) {
      for (int64_t k = 0; k < area; k += norm.together) {
        const int64_t place = block.n * area + k, row = place / norm.together;
        normalise(norm, block.x + k, block.ahead, eps, (scalar_t*)out + place * norm.num_channels,
                  mean[row], rstd[row]);
      }
    };
    for_blocks(norm.blocks, (const scalar_t*)norm.x, norm.stride_x, begin, end, body);
  });
}

// With z = (x - mean) rstd and w = weight grad: grad_x = (w - mean(w) - z mean(w z)) rstd. The
// gradients of weight and bias, grad z and grad, are added to `sum_weight` and `sum_bias`.
template <typename scalar_t>
inline void normalise_backward(const Norm& norm, const scalar_t* const* x, int64_t ahead,
                               const int64_t* tokens, const scalar_t* grad, int64_t grad_ahead,
                               float mean, float rstd, scalar_t* grad_x, float* sum_weight,
                               float* sum_bias) {
  const int64_t num_channels = norm.num_channels;
  const double count = (double)(norm.together * num_channels);
  double total_w = 0, total_wz = 0;
  for (int64_t k = 0; k < norm.together; ++k) {
    const int64_t at = k * num_channels;
    const scalar_t* out = grad_x + tokens[k] * num_channels;
    add_sums(num_channels, [&](int64_t i, auto n, Floats* sums) {
      __builtin_prefetch(out + i, 1, 2);
      const Floats w = load(grad + at + i, n) * load(norm.weight + at + i, n);
      sums[0] += w;
      sums[1] += w * ((load(x[k] + i, n) - mean) * rstd);
    }, total_w, total_wz);
  }
  const float mean_w = (float)(total_w / count), mean_wz = (float)(total_wz / count);
  for (int64_t k = 0; k < norm.together; ++k) {
    const int64_t at = k * num_channels;
    scalar_t* out = grad_x + tokens[k] * num_channels;
    for_lanes(num_channels, [&](int64_t i, auto n) {
      __builtin_prefetch(x[k] + ahead + i, 0, 2);
      __builtin_prefetch(grad + grad_ahead + at + i, 0, 2);
      const Floats g = load(grad + at + i, n), w = g * load(norm.weight + at + i, n);
      const Floats z = (load(x[k] + i, n) - mean) * rstd;
      store(out + i, (w - mean_w - z * mean_wz) * rstd, n);
      store(sum_weight + at + i, load(sum_weight + at + i, n) + g * z, n);
      store(sum_bias + at + i, load(sum_bias + at + i, n) + g, n);
    });
  }
}

// Blocks `[begin, end)`; `sums` are those of weight and bias, `[2, together * num_channels]`.
inline void merge_normalised_backward(const Norm& norm, const void* grad, int64_t stride_grad,
                                      const float* mean, const float* rstd, void* grad_x,
                                      float* sums, int64_t begin, int64_t end) {
  const int64_t area = norm.blocks.area(), size = norm.together * norm.num_channels;
  std::fill_n(sums, 2 * size, 0.0f);
  with_scalar(norm.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto body = [&](const Found<scalar_t>& block) {
      const scalar_t* grads = (const scalar_t*)grad + block.n * stride_grad;
      for (int64_t k = 0; k < area; k += norm.together) {
        const int64_t row = (block.n * area + k) / norm.together;
        normalise_backward(norm, block.x + k, block.ahead, block.tokens + k,
                           grads + k * norm.num_channels, stride_grad, mean[row], rstd[row],
                           (scalar_t*)grad_x, sums, sums + size);
      }
    };
    for_blocks(norm.blocks, (const scalar_t*)norm.x, norm.stride_x, begin, end, body);
  });
}

// Adds up columns `[begin, end)` of `rows`, `[num_rows, stride]`.
inline void sum_columns(const float* rows, int64_t num_rows, int64_t stride, float* out,
                        int64_t begin, int64_t end) {
  std::fill(out + begin, out + end, 0.0f);
  for (int64_t row = 0; row < num_rows; ++row)
    for_lanes(end - begin, [&](int64_t i, auto n) {
      store(out + begin + i, load(out + begin + i, n) + load(rows + row * stride + begin + i, n), n);
    });
}

}  // namespace patchpack::LEVEL
