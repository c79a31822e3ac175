// Which instruction sets this process may use: what the machine has, lowered by
// LORA_KERNELS_CPU_ISA or set_isa_limit().
#pragma once

#include <string>
#include <vector>

namespace lora_kernels::cpu {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

const char* isa_name(Isa isa);
Isa parse_isa(const std::string& name);  // throws std::invalid_argument

Isa machine_isa();                       // the best one of the machine; asks the kernel for AMX once
Isa active_isa();                        // min(machine, limit)
void set_isa_limit(const std::string& name);  // "" lifts the limit
std::vector<std::string> machine_isa_names();

}  // namespace lora_kernels::cpu
