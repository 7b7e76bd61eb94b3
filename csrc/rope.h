// Kernels of patchpack.ops.rope for one level of the CPU: see level.h.
#include "rotary_kernels.h"

namespace patchpack::LEVEL {

inline void rope(const Rotation& r, const RopeTable& table, int64_t begin, int64_t end) {
  rotate_tokens(r, begin, end, [&](int64_t token, float* cos, float* sin) {
    std::memcpy(cos, table.cos + token * table.stride_cos, r.num_pairs * sizeof(float));
    std::memcpy(sin, table.sin + token * table.stride_sin, r.num_pairs * sizeof(float));
  });
}

}  // namespace patchpack::LEVEL
