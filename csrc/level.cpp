#include "level.h"

#include <atomic>
#include <cstdlib>

#include "tensor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace patchpack {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16"};

Level best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx, edx;  // for what clang 14 has no name
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
  const bool bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax & bit_AVX512BF16;
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && bf16 && __builtin_cpu_supports("avx512vnni")) return Level::avx512_bf16;
  if (avx512) return Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::plain;
}

Level checked(const std::string& name) {
  std::string names;
  for (int i = 0; i <= (int)best(); ++i) {
    if (name == kNames[i]) return (Level)i;
    names += (i ? ", " : "") + std::string(kNames[i]);
  }
  STD_TORCH_CHECK(false, "PATCHPACK_CPU_CAPABILITY must be one of ", names, " here, got '", name, "'");
}

std::atomic<Level>& current() {
  static std::atomic<Level> level = [] {
    const char* asked = std::getenv("PATCHPACK_CPU_CAPABILITY");
    return asked && *asked ? checked(asked) : best();
  }();
  return level;
}

}  // namespace

Level level() { return current().load(std::memory_order_relaxed); }

std::string cpu_capability(const std::string& name) {
  if (!name.empty()) current().store(checked(name));
  return kNames[(int)level()];
}

}  // namespace patchpack
