#include "cpu/isa.h"
#include "cpu/kernels.h"

extern "C" {
extern const effops::cpu::Kernels effops_cpu_portable;
#if defined(__x86_64__)
extern const effops::cpu::Kernels effops_cpu_avx2, effops_cpu_avx512, effops_cpu_avx512bf16;
#endif
}

namespace effops::cpu {

const Kernels& kernels() {
  static const Kernels* const table = []() -> const Kernels* {
#if defined(__x86_64__)
    switch (chosen_isa()) {
      case Isa::avx2:
        return &effops_cpu_avx2;
      case Isa::avx512:
        return &effops_cpu_avx512;
      case Isa::avx512bf16:
        return &effops_cpu_avx512bf16;
      case Isa::portable:
        break;
    }
#else
    chosen_isa();
#endif
    return &effops_cpu_portable;
  }();
  return *table;
}

}  // namespace effops::cpu
