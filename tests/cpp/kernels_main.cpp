// kernels ISA: every test on the kernel table of one instruction set. Exit code 77: this processor
// lacks it.
#include <algorithm>

#include "check.h"
#include "cpu/isa.h"
#include "kernels_under_test.h"

namespace effops::test {

static const cpu::Kernels* table = nullptr;

const cpu::Kernels& kernels_under_test() { return *table; }

}  // namespace effops::test

int main(int argc, char** argv) {
  using effops::cpu::Isa;
  const std::string name = argc == 2 ? argv[1] : "";
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16}) {
    if (name != effops::cpu::name_of(isa)) continue;
    const std::vector<std::string> supported = effops::cpu::supported_isas();
    if (std::find(supported.begin(), supported.end(), name) == supported.end()) {
      std::cout << "skipped: this processor or this build lacks " << name << std::endl;
      return 77;
    }
    effops::test::table = &effops::cpu::kernels_of(isa);
    return effops::test::run_all_tests();
  }
  std::cerr << "kernels: expected the name of an instruction set, got '" << name << "'" << std::endl;
  return 2;
}
