#include <stdexcept>
#include <string>

#include "built_isas.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

#define EFFOPS_DECLARE(isa) extern const effops::cpu::Kernels effops_cpu_##isa;
extern "C" {
EFFOPS_BUILT_ISAS(EFFOPS_DECLARE)
}

namespace effops::cpu {

const Kernels& kernels_of(Isa isa) {
#define EFFOPS_CASE(name) \
  if (isa == Isa::name) return effops_cpu_##name;
  EFFOPS_BUILT_ISAS(EFFOPS_CASE)
  throw std::logic_error(std::string("kernels of ") + name_of(isa) + " are not in this build");
}

const Kernels& kernels() {
  static const Kernels& table = kernels_of(chosen_isa());
  return table;
}

}  // namespace effops::cpu
