// Kernels of patchpack.ops.mrope for one level of the CPU: see level.h.
#include "rotary_kernels.h"

namespace patchpack::LEVEL {

inline void mrope(const Rotation& r, const Positions& positions,
                  const std::vector<Frequency>& frequencies, int64_t begin, int64_t end) {
  rotate_tokens(r, begin, end, [&](int64_t token, float* cos, float* sin) {
    int32_t axes[3];
    for (int axis = 0; axis < 3; ++axis) axes[axis] = positions.at(axis, token);
    for (int64_t i = 0; i < r.num_pairs; ++i) {
      const Frequency f = frequencies[i];
      cos_sin(axes[f.axis], f.high, f.low, cos[i], sin[i]);
    }
  });
}

}  // namespace patchpack::LEVEL
