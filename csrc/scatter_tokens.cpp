// Rows of a sequence replaced; the maths is in patchpack.reference.scatter_tokens.
#include "integers.h"
#include "past_caches.h"
#include "rows.h"
#include "sums.h"

namespace patchpack {
namespace {

// Where each row of the result, or of a gradient, comes from: -1 is its own place, 0 to V - 1 a
// vector, V + i token i.
struct Sources {
  const int32_t* of;
  int64_t num_rows, num_vectors, num_bytes;
  bool past_caches;
};

}  // namespace
}  // namespace patchpack

#define KERNELS "scatter_tokens.h"
#include "foreach_level.h"

namespace patchpack {

// The second result is that of `Sources`.
std::tuple<Tensor, Tensor> scatter_tokens(Tensor embeds, Tensor tokens, Tensor index,
                                          std::optional<Tensor> vectors,
                                          std::optional<Tensor> vector_index) {
  const int64_t num_rows = embeds.size(0) * embeds.size(1), num_tokens = index.size(0);
  const Tensor out = empty_of(embeds), sources_tensor = empty({num_rows}, ScalarType::Int);
  int32_t* sources = sources_tensor.mutable_data_ptr<int32_t>();
  const int64_t num_vectors = vectors ? vectors->size(0) : 0;
  if (vector_index) {
    const Tensor which_tensor = all_contiguous(*vector_index);
    const Integers which(which_tensor);
    for (int64_t row = 0; row < num_rows; ++row)
      sources[row] = (int32_t)std::min(std::max<int64_t>(which[row], -1), num_vectors - 1);
  } else {
    std::fill(sources, sources + num_rows, -1);
  }
  const Tensor index_tensor = all_contiguous(index);
  const Integers rows(index_tensor);
  for (int64_t i = 0; i < num_tokens; ++i)
    if (rows[i] >= 0 && rows[i] < num_rows) sources[rows[i]] = (int32_t)(num_vectors + i);

  embeds = last_contiguous(embeds);
  tokens = last_contiguous(tokens);
  const Tensor learned = last_contiguous(vectors.value_or(tokens));
  const Rows from_embeds(embeds), from_tokens(tokens), from_vectors(learned);
  const Sources from{sources, num_rows, num_vectors, from_embeds.num_bytes,
                     past_caches(embeds, out)};
  parallel_for(num_rows, from_embeds.num_channels, [&](int64_t begin, int64_t end) {
    AT_LEVEL(scatter(from, from_embeds, from_tokens, from_vectors, (char*)out.mutable_data_ptr(),
                     begin, end));
  });
  return {out, sources_tensor};
}

std::tuple<Tensor, Tensor, Tensor> scatter_tokens_backward(Tensor grad, Tensor sources_tensor,
                                                           Tensor index, int64_t num_vectors) {
  const int64_t num_rows = sources_tensor.size(0), num_tokens = index.size(0);
  const Tensor grad_embeds = empty_of(grad);
  const Tensor grad_tokens = empty({num_tokens, grad.size(2)}, grad.scalar_type());
  const int32_t* sources = sources_tensor.const_data_ptr<int32_t>();
  const Tensor index_tensor = all_contiguous(index);
  const Integers rows(index_tensor);

  grad = last_contiguous(grad);
  const Rows from(grad);
  const Sources to{sources, num_rows, num_vectors, from.num_bytes, past_caches(grad, grad_embeds)};
  parallel_for(num_rows, from.num_channels, [&](int64_t begin, int64_t end) {
    AT_LEVEL(embeds_backward(to, from, (char*)grad_embeds.mutable_data_ptr(), begin, end));
  });
  parallel_for(num_tokens, from.num_channels, [&](int64_t begin, int64_t end) {
    AT_LEVEL(tokens_backward(to, from, rows, (char*)grad_tokens.mutable_data_ptr(), begin, end));
  });
  return {grad_embeds, grad_tokens, sum_rows(grad, sources_tensor, num_vectors)};
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("scatter_tokens.native", TORCH_BOX(&scatter_tokens));
  library.impl("scatter_tokens_backward.native", TORCH_BOX(&scatter_tokens_backward));
}

}  // namespace patchpack
