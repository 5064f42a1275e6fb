#pragma once

#include <pybind11/pybind11.h>

namespace effops::pim {

// The simulator as a submodule of the host objects.
void add_to(pybind11::module_& host);

}  // namespace effops::pim
