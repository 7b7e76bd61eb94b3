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

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define LEVEL avx512
#define LEVEL_LANES 16
#define LEVEL_HAS_AVX2 1
#define LEVEL_HAS_AVX512 1
#include "vec.h"
#include KERNELS
#undef LEVEL
#if defined(KERNELS_USE_BF16)
#pragma GCC target("avx512bf16,avx512vnni")
#define LEVEL avx512_bf16
#define LEVEL_HAS_BF16 1
#define LEVEL_HAS_VNNI 1
#include "vec.h"
#include KERNELS
#undef LEVEL
#undef LEVEL_HAS_BF16
#undef LEVEL_HAS_VNNI
#else
namespace patchpack { namespace avx512_bf16 = avx512; }
#endif
#undef LEVEL_HAS_AVX512
#undef LEVEL_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define LEVEL avx2
#define LEVEL_LANES 8
#include "vec.h"
#include KERNELS
#undef LEVEL
#undef LEVEL_LANES
#undef LEVEL_HAS_AVX2
#pragma GCC pop_options
#endif

#define LEVEL plain
#define LEVEL_LANES 4
#include "vec.h"
#include KERNELS
#undef LEVEL
#undef LEVEL_LANES
#undef KERNELS
