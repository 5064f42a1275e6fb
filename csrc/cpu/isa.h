// Which instruction set the CPU kernels use. EFFOPS_CPU_ISA forces one; a value that
// names none of this build, or one that this processor lacks, throws std::runtime_error.
#pragma once

#include <string>
#include <vector>

namespace effops::cpu {

enum class Isa { portable, avx2, avx512, avx512bf16 };

const char* name_of(Isa isa);
std::vector<std::string> supported_isas();  // by this machine and this build, slowest first
Isa chosen_isa();

}  // namespace effops::cpu
