// Kernels of patchpack.ops.rope for one level of the CPU: see level.h.
#include "rotary_kernels.h"

namespace patchpack::LEVEL {

inline void rope(const Rotation& r, const RopeTable& table, int64_t begin, int64_t end) {
  rotate_tokens(r, begin, end, [&](int64_t token) {
    return std::pair(table.cos + token * table.stride_cos, table.sin + token * table.stride_sin);
  });
}

}  // namespace patchpack::LEVEL
