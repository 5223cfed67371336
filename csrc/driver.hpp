#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include <pybind11/pybind11.h>

namespace fastgan {

// CUDA graphs through the driver's library, which is opened at the first call and not needed before: no CUDA headers, no
// link. Every function throws std::runtime_error with the failed function and CUDA's name for the error, or with what
// the library lacks. Handles are the addresses that torch gives; 0 is refused.

// As cuDriverGetVersion has it: 1000 major + 10 minor.
int driver_version();

// How many nodes of each kind a graph (CUgraph) has, those of its child graphs included.
std::map<std::string, std::size_t> graph_nodes(std::uintptr_t graph);

// Launches an instantiated graph (CUgraphExec) `times` times in a row, without waiting for the last. Now and then it calls
// `between`, which may throw.
void replay(std::uintptr_t graph_exec, std::uintptr_t stream, std::int64_t times, const std::function<void()>& between);

void bind_driver(pybind11::module_& m);

}  // namespace fastgan
