// Square blocks of tokens become one token; the maths is in patchpack.reference.merge_tokens.
#include "blocks.h"
#include "tensor.h"

namespace patchpack {
namespace {

// A LayerNorm of rows of `together` tokens, all of a block or one: weight and bias are
// `[together * num_channels]`.
struct Norm {
  ScalarType dtype;
  Blocks blocks;
  int64_t num_channels, together;
  const void* x;
  int64_t stride_x;
  const float *weight, *bias;
};

}  // namespace
}  // namespace patchpack

#define KERNELS "merge_tokens.h"
#include "foreach_level.h"

namespace patchpack {
namespace {

// Weight or bias in float32, or what stands for it where there is none.
Tensor in_float(const std::optional<Tensor>& param, int64_t size, double otherwise) {
  if (!param) return torch::stable::full({size}, otherwise, ScalarType::Float);
  return torch::stable::contiguous(torch::stable::to(*param, ScalarType::Float));
}

Blocks blocks_of(const Tensor& geometry, int64_t merge, int64_t size, bool by_column) {
  return {{geometry.const_data_ptr<int64_t>(), geometry.size(0) - 1}, merge, size, by_column};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> merge_tokens(Tensor x, std::optional<Tensor> weight,
                                                std::optional<Tensor> bias, Tensor geometry,
                                                int64_t num_blocks, int64_t spatial_merge_size,
                                                int64_t merge_size, bool by_column, double eps) {
  const Blocks blocks = blocks_of(geometry, spatial_merge_size, merge_size, by_column);
  const int64_t area = blocks.area(), num_channels = x.size(1), cost = area * num_channels;
  x = last_contiguous(x);
  const Tensor out = empty({num_blocks, cost}, x.scalar_type());
  if (!weight && !bias) {
    const int64_t bytes = num_channels * x.element_size(), stride = x.stride(0) * x.element_size();
    const char* from = (const char*)x.const_data_ptr();
    char* to = (char*)out.mutable_data_ptr();
    parallel_for(num_blocks, cost, [&](int64_t begin, int64_t end) {
      for_blocks(blocks, from, stride, begin, end, [&](const Found<char>& block) {
        for (int64_t k = 0; k < area; ++k)
          std::memcpy(to + (block.n * area + k) * bytes, block.x[k], bytes);
      });
    });
    return {out, empty({0}, ScalarType::Float), empty({0}, ScalarType::Float)};
  }

  const int64_t size = (weight ? *weight : *bias).size(0), together = size / num_channels;
  const Tensor factors = in_float(weight, size, 1.0), terms = in_float(bias, size, 0.0);
  const Norm norm{x.scalar_type(),  blocks,      num_channels,
                  together,         x.const_data_ptr(), x.stride(0),
                  factors.const_data_ptr<float>(), terms.const_data_ptr<float>()};
  const Tensor mean = empty({num_blocks * area / together}, ScalarType::Float);
  const Tensor rstd = empty_of(mean);
  parallel_for(num_blocks, cost, [&](int64_t begin, int64_t end) {
    AT_LEVEL(merge_normalised(norm, eps, out.mutable_data_ptr(), mean.mutable_data_ptr<float>(),
                              rstd.mutable_data_ptr<float>(), begin, end));
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> merge_tokens_backward(
    Tensor grad, std::optional<Tensor> x, std::optional<Tensor> weight, std::optional<Tensor> bias,
    Tensor geometry, Tensor mean, Tensor rstd, int64_t spatial_merge_size, int64_t merge_size,
    bool by_column) {
  const Blocks blocks = blocks_of(geometry, spatial_merge_size, merge_size, by_column);
  const int64_t area = blocks.area(), num_blocks = grad.size(0), cost = grad.size(1);
  const int64_t num_channels = cost / area;
  grad = last_contiguous(grad);
  const Tensor grad_x = empty({num_blocks * area, num_channels}, grad.scalar_type());
  if (!weight && !bias) {
    const int64_t size = grad.element_size(), bytes = num_channels * size;
    const int64_t stride = grad.stride(0) * size;
    const char* from = (const char*)grad.const_data_ptr();
    char* to = (char*)grad_x.mutable_data_ptr();
    parallel_for(num_blocks, cost, [&](int64_t begin, int64_t end) {
      for_blocks(blocks, to, bytes, begin, end, [&](const Found<char>& block) {
        for (int64_t k = 0; k < area; ++k)
          std::memcpy((char*)block.x[k], from + block.n * stride + k * bytes, bytes);
      });
    });
    return {grad_x, empty({0}, grad.scalar_type()), empty({0}, grad.scalar_type())};
  }

  const int64_t size = (weight ? *weight : *bias).size(0);
  const Tensor factors = in_float(weight, size, 1.0), rows = last_contiguous(*x);
  const Norm norm{rows.scalar_type(),
                  blocks,
                  num_channels,
                  size / num_channels,
                  rows.const_data_ptr(),
                  rows.stride(0),
                  factors.const_data_ptr<float>(),
                  nullptr};
  // blocks are shared out by their number alone, and with them every sum
  const int64_t share = std::max<int64_t>(16, (num_blocks + 127) / 128);
  const int64_t num_shares = (num_blocks + share - 1) / share;
  const Tensor partials = empty({num_shares, 2, size}, ScalarType::Float);
  float* sums = partials.mutable_data_ptr<float>();
  parallel_for(num_shares, share * cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      AT_LEVEL(merge_normalised_backward(
          norm, grad.const_data_ptr(), grad.stride(0), mean.const_data_ptr<float>(),
          rstd.const_data_ptr<float>(), grad_x.mutable_data_ptr(), sums + i * 2 * size, i * share,
          std::min((i + 1) * share, num_blocks)));
  });

  const auto total = [&](const std::optional<Tensor>& param, const float* rows) {
    if (!param) return empty({0}, grad.scalar_type());
    const Tensor out = empty({size}, ScalarType::Float);
    parallel_for(size, num_shares, [&](int64_t begin, int64_t end) {
      AT_LEVEL(sum_columns(rows, num_shares, 2 * size, out.mutable_data_ptr<float>(), begin, end));
    });
    return torch::stable::to(out, param->scalar_type());
  };
  return {grad_x, total(weight, sums), total(bias, sums + size)};
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("merge_tokens.native", TORCH_BOX(&merge_tokens));
  library.impl("merge_tokens_backward.native", TORCH_BOX(&merge_tokens_backward));
}

}  // namespace patchpack
