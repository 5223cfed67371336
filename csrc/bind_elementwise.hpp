#pragma once
#include <pybind11/pybind11.h>

namespace fastgan {

// Adds elementwise.hpp's functions, each as name_f32 and name_f64; arrays are addresses.
void bind_elementwise(pybind11::module_& m);

}  // namespace fastgan
