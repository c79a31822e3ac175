// Which instruction sets this process may use: what the machine has, lowered by
// LORA_KERNELS_CPU_ISA or set_isa_limit().
#pragma once

#include <string>
#include <type_traits>
#include <vector>

namespace lora_kernels::cpu {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

const char* isa_name(Isa isa);
Isa parse_isa(const std::string& name);  // throws std::invalid_argument

Isa machine_isa();                       // the best one of the machine; asks the kernel for AMX once
Isa active_isa();                        // min(machine, limit)
void set_isa_limit(const std::string& name);  // "" lifts the limit
std::vector<std::string> machine_isa_names();

// What the best instruction set in use answers to `args`. One whose getter is null or answers null
// has nothing of its own for them: the next lower one is asked.
template <class Getter, class... Args>
auto for_active_isa(std::type_identity_t<Getter> amx, std::type_identity_t<Getter> avx512,
                    std::type_identity_t<Getter> avx2, Getter baseline, const Args&... args) {
  const Getter getters[] = {baseline, avx2, avx512, amx};
  for (int isa = static_cast<int>(active_isa()); isa > 0; --isa) {
    if (getters[isa] == nullptr) continue;
    if (const auto found = getters[isa](args...)) return found;
  }
  return baseline(args...);
}

}  // namespace lora_kernels::cpu
