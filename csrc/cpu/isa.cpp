#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#include "built_isas.h"

namespace effops::cpu {
namespace {

#define EFFOPS_NAME(isa) Isa::isa,
constexpr Isa kBuilt[] = {EFFOPS_BUILT_ISAS(EFFOPS_NAME)};

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512bf16:
      return supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == Isa::portable;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512bf16:
      return "avx512bf16";
  }
  return "?";
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : kBuilt)
    if (supported(isa)) names.push_back(name_of(isa));
  return names;
}

Isa chosen_isa() {
  const char* forced = std::getenv("EFFOPS_CPU_ISA");
  if (forced != nullptr && *forced != '\0') {
    std::string choices;
    for (Isa isa : kBuilt) {
      if (std::string(forced) == name_of(isa)) {
        if (supported(isa)) return isa;
        throw std::runtime_error(std::string("EFFOPS_CPU_ISA: this processor does not support ") + forced);
      }
      choices += std::string(choices.empty() ? "" : ", ") + name_of(isa);
    }
    throw std::runtime_error(std::string("EFFOPS_CPU_ISA: expected one of ") + choices + ", got " + forced);
  }
  Isa best = Isa::portable;
  for (Isa isa : kBuilt)
    if (supported(isa)) best = isa;
  return best;
}

}  // namespace effops::cpu
