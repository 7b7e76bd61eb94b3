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

// Copies bytes, aligned or not.
inline void copy_bytes(void* out, const void* x, int64_t bytes, bool past_caches) {
#if defined(__SSE2__)
  if (past_caches) {
    constexpr int64_t kStep = sizeof(__m128i);
    char* to = (char*)out;
    const char* from = (const char*)x;
    const int64_t head = std::min<int64_t>(bytes, -(uintptr_t)out % kStep);
    std::memcpy(to, from, head);
    int64_t i = head;
    for (; i + kStep <= bytes; i += kStep)
      _mm_stream_si128((__m128i*)(to + i), _mm_loadu_si128((const __m128i*)(from + i)));
    std::memcpy(to + i, from + i, bytes - i);
    return;
  }
#endif
  std::memcpy(out, x, bytes);
}

}  // namespace patchpack
