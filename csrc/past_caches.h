// Writing past the caches, for what they would not hold: memory is written without being read first.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "tensor.h"

namespace patchpack {

// Whether to write `out` so: it and `x`, of which it is made, are more than caches hold, and the
// rows of both, which are made of each other, are whole cache lines.
inline bool past_caches(const Tensor& x, const Tensor& out) {
  constexpr int64_t kCaches = 32 << 20, kLine = 64;
  const int64_t size = (int64_t)out.element_size();
  const bool aligned = (uintptr_t)out.const_data_ptr() % kLine == 0 &&
                       out.size(out.dim() - 1) * size % kLine == 0 &&
                       x.size(x.dim() - 1) * size % kLine == 0;
  return aligned && (x.numel() + out.numel()) * size > kCaches;
}

// Makes what was written so visible to other threads.
inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace patchpack
