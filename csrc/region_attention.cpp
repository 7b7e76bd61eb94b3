// One query attends to each square of tokens; the maths is in patchpack.reference.region_attention.
#include "blocks.h"
#include "tensor.h"

namespace patchpack {
namespace {

// The cells of `tokens`, and of each a row of `query`.
struct Cells {
  ScalarType dtype;
  Blocks blocks;
  int64_t num_channels;
  float scale;
  const void *query, *tokens;
  int64_t stride_query, stride_tokens;
};

}  // namespace
}  // namespace patchpack

#define KERNELS "region_attention.h"
#include "foreach_level.h"

namespace patchpack {
namespace {

Cells cells_of(const Tensor& query, const Tensor& tokens, const Tensor& geometry, int64_t merge,
               int64_t region, double scale) {
  const Blocks blocks{{geometry.const_data_ptr<int64_t>(), geometry.size(0) - 1}, merge, region,
                      false};
  return {query.scalar_type(),    blocks,          query.size(1),  (float)scale,
          query.const_data_ptr(), tokens.const_data_ptr(), query.stride(0), tokens.stride(0)};
}

}  // namespace

std::tuple<Tensor, Tensor> region_attention(Tensor query, Tensor tokens, Tensor geometry,
                                            int64_t spatial_merge_size, int64_t region,
                                            double softmax_scale) {
  query = last_contiguous(query);
  tokens = last_contiguous(tokens);
  const Cells cells = cells_of(query, tokens, geometry, spatial_merge_size, region, softmax_scale);
  const int64_t area = region * region;
  const Tensor out = empty_of(query), p = empty({query.size(0), area}, ScalarType::Float);
  parallel_for(query.size(0), area * query.size(1), [&](int64_t begin, int64_t end) {
    AT_LEVEL(attend(cells, out.mutable_data_ptr(), p.mutable_data_ptr<float>(), begin, end));
  });
  return {out, p};
}

std::tuple<Tensor, Tensor> region_attention_backward(Tensor grad, Tensor query, Tensor tokens,
                                                     Tensor geometry, Tensor p,
                                                     int64_t spatial_merge_size, int64_t region,
                                                     double softmax_scale) {
  grad = last_contiguous(grad);
  query = last_contiguous(query);
  tokens = last_contiguous(tokens);
  const Cells cells = cells_of(query, tokens, geometry, spatial_merge_size, region, softmax_scale);
  const Tensor grad_query = empty_of(query), grad_tokens = empty_of(tokens);
  parallel_for(query.size(0), region * region * query.size(1), [&](int64_t begin, int64_t end) {
    AT_LEVEL(attend_backward(cells, grad.const_data_ptr(), grad.stride(0),
                             p.const_data_ptr<float>(), grad_query.mutable_data_ptr(),
                             grad_tokens.mutable_data_ptr(), begin, end));
  });
  return {grad_query, grad_tokens};
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("region_attention.native", TORCH_BOX(&region_attention));
  library.impl("region_attention_backward.native", TORCH_BOX(&region_attention_backward));
}

}  // namespace patchpack
