#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lora_kernels::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "amx"};

#if defined(__x86_64__)
bool amx_bf16() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), bf16 = d & (1u << 22);
  unsigned a1 = 0;
  if (!__get_cpuid_count(7, 1, &a1, &b, &c, &d)) return false;
  const bool avx512_bf16 = a1 & (1u << 5);
  if (!tile || !bf16 || !avx512_bf16) return false;
  // Linux hands out the tile state on request, once per process (ARCH_REQ_XCOMP_PERM).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && amx_bf16()) return Isa::kAmx;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa limit_from_environment() {
  const char* name = std::getenv("LORA_KERNELS_CPU_ISA");
  return name == nullptr || *name == '\0' ? Isa::kAmx : parse_isa(name);
}

std::atomic<Isa>& limit() {
  static std::atomic<Isa> value{limit_from_environment()};
  return value;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa parse_isa(const std::string& name) {
  for (int i = 0; i < 4; ++i) {
    if (name == kNames[i]) return static_cast<Isa>(i);
  }
  throw std::invalid_argument("CPU ISA '" + name +
                              "' is unknown; accepted: baseline, avx2, avx512, amx");
}

Isa machine_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() { return std::min(machine_isa(), limit().load()); }

void set_isa_limit(const std::string& name) {
  limit().store(name.empty() ? Isa::kAmx : parse_isa(name));
}

std::vector<std::string> machine_isa_names() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(machine_isa()); ++i) names.emplace_back(kNames[i]);
  return names;
}

}  // namespace lora_kernels::cpu
