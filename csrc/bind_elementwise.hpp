#pragma once
#include <pybind11/pybind11.h>

namespace fastgan {

// Adds what elementwise.hpp and product.hpp have; arrays are addresses, and the first argument says whether of double.
void bind_elementwise(pybind11::module_& m);

}  // namespace fastgan
