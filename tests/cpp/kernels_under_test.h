#pragma once

#include "cpu/kernels.h"

namespace effops::test {

// The table that the command line chose.
const cpu::Kernels& kernels_under_test();

}  // namespace effops::test
