// Which instructions the CPU has, and how a kernel is compiled for each and chosen at run time.
//
// A file of kernels, `<op>.h`, is compiled once for each level, in a namespace of the level's name:
//
//     #define KERNELS "rope.h"
//     #include "foreach_level.h"
//
// after which `AT_LEVEL(rotate(args))` calls the one that this CPU runs best.
#pragma once

#include <string>

namespace patchpack {

enum class Level { plain, avx2, avx512, avx512_bf16 };

// The best level of this CPU, or the lower one asked for.
Level level();

// Sets the level, unless `name` is empty, to one that this CPU has, and gives the name of the one
// in use. The environment variable PATCHPACK_CPU_CAPABILITY sets it at first.
std::string cpu_capability(const std::string& name);

}  // namespace patchpack

#if defined(__x86_64__)
#define AT_LEVEL(call)                                      \
  [&] {                                                     \
    switch (::patchpack::level()) {                         \
      case ::patchpack::Level::avx512_bf16:                 \
        return ::patchpack::avx512_bf16::call;              \
      case ::patchpack::Level::avx512:                      \
        return ::patchpack::avx512::call;                   \
      case ::patchpack::Level::avx2:                        \
        return ::patchpack::avx2::call;                     \
      default:                                              \
        return ::patchpack::plain::call;                    \
    }                                                       \
  }()
#else
#define AT_LEVEL(call) ::patchpack::plain::call
#endif
