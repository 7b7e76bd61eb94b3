// Square blocks of tokens become one token; the maths is in patchpack.reference.merge_tokens.
#include "blocks.h"
#include "past_caches.h"
#include "tensor.h"

namespace patchpack {
namespace {

// Blocks whose tokens, of so many bytes, are copied.
struct Copies {
  Blocks blocks;
  int64_t num_bytes;
  bool past_caches;
};

// A LayerNorm of rows of `together` tokens, all of a block or one.
struct Norm {
  ScalarType dtype;
  Blocks blocks;
  int64_t num_channels, together;
  const void* x;
  int64_t stride_x;
  const float *weight, *bias;  // [together * num_channels]
};

struct NormGrad {
  const void* grad;
  int64_t stride;
  const float *mean, *rstd;
  void* grad_x;
};

}  // namespace
}  // namespace patchpack

#define KERNELS "merge_tokens.h"
#include "foreach_level.h"

namespace patchpack {
namespace {

// Weight or bias in float32, or `absent` where there is none.
Tensor in_float(const std::optional<Tensor>& param, int64_t size, double absent) {
  if (!param) return torch::stable::full({size}, absent, ScalarType::Float);
  return torch::stable::contiguous(torch::stable::to(*param, ScalarType::Float));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> merge_tokens(Tensor x, std::optional<Tensor> weight,
                                                std::optional<Tensor> bias, Tensor geometry,
                                                int64_t num_blocks, int64_t spatial_merge_size,
                                                int64_t merge_size, bool by_column, double eps) {
  const Blocks blocks{{geometry.const_data_ptr<int64_t>(), geometry.size(0) - 1},
                      spatial_merge_size, merge_size, by_column};
  const int64_t area = blocks.area(), num_channels = x.size(1);
  x = last_contiguous(x);
  const Tensor out = empty({num_blocks, area * num_channels}, x.scalar_type());
  const bool past = past_caches(x, out);
  if (!weight && !bias) {
    const int64_t element = x.element_size();
    const Copies copies{blocks, num_channels * element, past};
    parallel_for(num_blocks, area * num_channels, [&](int64_t begin, int64_t end) {
      AT_LEVEL(merge(copies, (const char*)x.const_data_ptr(), x.stride(0) * element,
                     (char*)out.mutable_data_ptr(), begin, end));
    });
    return {out, empty({0}, ScalarType::Float), empty({0}, ScalarType::Float)};
  }

  const int64_t size = (weight ? *weight : *bias).size(0), together = size / num_channels;
  const Tensor factors = in_float(weight, size, 1), terms = in_float(bias, size, 0);
  const Norm norm{x.scalar_type(), blocks, num_channels, together, x.const_data_ptr(), x.stride(0),
                  factors.const_data_ptr<float>(), terms.const_data_ptr<float>()};
  const Tensor mean = empty({num_blocks * area / together}, ScalarType::Float);
  const Tensor rstd = empty_of(mean);
  parallel_for(num_blocks, area * num_channels, [&](int64_t begin, int64_t end) {
    AT_LEVEL(merge_normalised(norm, eps, past, out.mutable_data_ptr(),
                              mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), begin,
                              end));
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> merge_tokens_backward(
    Tensor grad, std::optional<Tensor> x, std::optional<Tensor> weight, std::optional<Tensor> bias,
    Tensor geometry, Tensor mean, Tensor rstd, int64_t spatial_merge_size, int64_t merge_size,
    bool by_column) {
  const Blocks blocks{{geometry.const_data_ptr<int64_t>(), geometry.size(0) - 1},
                      spatial_merge_size, merge_size, by_column};
  const int64_t area = blocks.area(), num_blocks = grad.size(0), num_channels = grad.size(1) / area;
  grad = last_contiguous(grad);
  const Tensor grad_x = empty({num_blocks * area, num_channels}, grad.scalar_type());
  if (!weight && !bias) {
    const int64_t element = grad.element_size();
    const Copies copies{blocks, num_channels * element, past_caches(grad, grad_x)};
    parallel_for(num_blocks, area * num_channels, [&](int64_t begin, int64_t end) {
      AT_LEVEL(split(copies, (const char*)grad.const_data_ptr(), grad.stride(0) * element,
                     (char*)grad_x.mutable_data_ptr(), begin, end));
    });
    return {grad_x, empty({0}, grad.scalar_type()), empty({0}, grad.scalar_type())};
  }

  const int64_t size = (weight ? *weight : *bias).size(0);
  const Tensor factors = in_float(weight, size, 1), tokens = last_contiguous(*x);
  const Norm norm{grad.scalar_type(), blocks, num_channels, size / num_channels,
                  tokens.const_data_ptr(), tokens.stride(0), factors.const_data_ptr<float>(),
                  nullptr};
  const NormGrad g{grad.const_data_ptr(), grad.stride(0), mean.const_data_ptr<float>(),
                   rstd.const_data_ptr<float>(), grad_x.mutable_data_ptr()};
  // blocks are shared out by their number alone, and with them every sum
  const int64_t share = std::max<int64_t>(16, (num_blocks + 127) / 128);
  const int64_t num_shares = (num_blocks + share - 1) / share;
  const Tensor partials = empty({num_shares, 2, size}, ScalarType::Float);
  float* sums = partials.mutable_data_ptr<float>();
  parallel_for(num_shares, share * area * num_channels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      AT_LEVEL(merge_normalised_backward(norm, g, sums + i * 2 * size, i * share,
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
