// Rotary position embedding from a table; the maths is in patchpack.reference.rope.
#include "rotary.h"

namespace patchpack {
namespace {

struct RopeTable {
  const float *cos, *sin;
  int64_t stride_cos, stride_sin;
};

}  // namespace
}  // namespace patchpack

#define KERNELS "rope.h"
#include "foreach_level.h"

namespace patchpack {

std::tuple<Tensor, Tensor> rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved,
                                bool inverse) {
  cos = last_contiguous(torch::stable::to(cos, ScalarType::Float));  // itself if it is float
  sin = last_contiguous(torch::stable::to(sin, ScalarType::Float));
  const RopeTable table{cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), cos.stride(0),
                        sin.stride(0)};
  const Turned turned[] = {to_elsewhere(q), to_elsewhere(k)};
  rotate_both(turned[0], turned[1], cos.size(1), interleaved, inverse,
              [&](const Rotation& r, int64_t begin, int64_t end) {
                AT_LEVEL(rope(r, table, begin, end));
              });
  return {turned[0].out, turned[1].out};
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("rope.native", TORCH_BOX(&rope));
}

}  // namespace patchpack
