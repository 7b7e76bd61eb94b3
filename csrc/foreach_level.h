// Includes the file KERNELS once for each level: see level.h. With KERNELS_USE_BF16 defined it is
// also compiled for the CPU's bfloat16 and 8-bit products; otherwise that level is the one below.
#include "level.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The code between BEGIN_TARGET and END_TARGET may use these instructions. What is included above
// may not, and is shared by all levels: an inline function has one body in the whole library.
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(features) \
  PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features)                        \
  PRAGMA(GCC push_options) PRAGMA(GCC target(features)) \
  PRAGMA(GCC target("prefer-vector-width=512"))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__)
BEGIN_TARGET("avx2,fma,f16c,bmi2")
#define LEVEL avx2
#define LEVEL_LANES 8
#define LEVEL_HAS_AVX2 1
#include "vec.h"
#include KERNELS
#undef LEVEL
#undef LEVEL_LANES
END_TARGET

BEGIN_TARGET("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#define LEVEL avx512
#define LEVEL_LANES 16
#define LEVEL_HAS_AVX512 1
#include "vec.h"
#include KERNELS
#undef LEVEL
END_TARGET

#if defined(KERNELS_USE_BF16)
BEGIN_TARGET("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define LEVEL avx512_bf16
#define LEVEL_HAS_BF16 1
#define LEVEL_HAS_VNNI 1
#include "vec.h"
#include KERNELS
#undef LEVEL
#undef LEVEL_HAS_BF16
#undef LEVEL_HAS_VNNI
END_TARGET
#else
namespace patchpack { namespace avx512_bf16 = avx512; }
#endif
#undef LEVEL_LANES
#undef LEVEL_HAS_AVX512
#undef LEVEL_HAS_AVX2
#endif

#define LEVEL plain
#define LEVEL_LANES 4
#include "vec.h"
#include KERNELS
#undef LEVEL
#undef LEVEL_LANES

#undef BEGIN_TARGET
#undef END_TARGET
#undef PRAGMA
#undef KERNELS
