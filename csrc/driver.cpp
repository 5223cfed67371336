#include "driver.hpp"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace fastgan {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr const char* kKinds[] = {"kernel",     "memcpy",       "memset",           "host",           "graph",
                                  "empty",      "wait_event",   "event_record",     "signal_external", "wait_external",
                                  "mem_alloc",  "mem_free",     "batch_mem_op",     "conditional"};
constexpr int kChildGraph = 4;
constexpr std::int64_t kBetween = 256;  // launches

using Result = int;  // CUresult
using Handle = void*;

template <typename Function>
Function symbol(void* library, const char* name) {
  const auto found = reinterpret_cast<Function>(dlsym(library, name));
  if (found == nullptr) throw std::runtime_error(std::string(kLibrary) + " has no " + name + ": the driver is too old");
  return found;
}

struct Driver {
  Result (*error_name)(Result, const char**);
  Result (*version)(int*);
  Result (*graph_launch)(Handle exec, Handle stream);
  Result (*graph_nodes)(Handle graph, Handle* nodes, std::size_t* count);
  Result (*node_type)(Handle node, int* type);
  Result (*child_graph)(Handle node, Handle* graph);

  Driver() {
    void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);  // never closed: other libraries use it too
    if (library == nullptr) {
      const char* const reason = dlerror();
      throw std::runtime_error(std::string("no CUDA driver: ") + (reason != nullptr ? reason : kLibrary));
    }
    const auto load = [&](auto& function, const char* name) {
      function = symbol<std::decay_t<decltype(function)>>(library, name);
    };
    load(error_name, "cuGetErrorName");
    load(version, "cuDriverGetVersion");
    load(graph_launch, "cuGraphLaunch");
    load(graph_nodes, "cuGraphGetNodes");
    load(node_type, "cuGraphNodeGetType");
    load(child_graph, "cuGraphChildGraphNodeGetGraph");
  }

  void check(Result result, const char* function) const {
    if (result == 0) return;
    const char* name = nullptr;
    if (error_name(result, &name) != 0 || name == nullptr) name = "unknown error";
    throw std::runtime_error(std::string(function) + ": " + name + " (" + std::to_string(result) + ")");
  }
};

const Driver& driver() {
  static const Driver loaded;  // where that throws, the next call tries again
  return loaded;
}

Handle handle(std::uintptr_t address, const char* what) {
  if (address == 0) throw std::invalid_argument(std::string(what) + " is 0, expected a handle");
  return reinterpret_cast<Handle>(address);
}

void count_nodes(const Driver& cuda, Handle graph, std::map<std::string, std::size_t>& counts) {
  std::size_t n = 0;
  cuda.check(cuda.graph_nodes(graph, nullptr, &n), "cuGraphGetNodes");
  std::vector<Handle> nodes(n);
  if (n > 0) cuda.check(cuda.graph_nodes(graph, nodes.data(), &n), "cuGraphGetNodes");
  for (Handle node : nodes) {
    int type = 0;
    cuda.check(cuda.node_type(node, &type), "cuGraphNodeGetType");
    const bool known = type >= 0 && type < static_cast<int>(std::size(kKinds));
    ++counts[known ? kKinds[type] : "kind " + std::to_string(type)];
    if (type == kChildGraph) {
      Handle child = nullptr;
      cuda.check(cuda.child_graph(node, &child), "cuGraphChildGraphNodeGetGraph");
      count_nodes(cuda, child, counts);
    }
  }
}

}  // namespace

int driver_version() {
  int version = 0;
  driver().check(driver().version(&version), "cuDriverGetVersion");
  return version;
}

std::map<std::string, std::size_t> graph_nodes(std::uintptr_t graph) {
  std::map<std::string, std::size_t> counts;
  count_nodes(driver(), handle(graph, "graph_nodes: graph"), counts);
  return counts;
}

void replay(std::uintptr_t graph_exec, std::uintptr_t stream, std::int64_t times, const std::function<void()>& between) {
  if (times < 0) throw std::invalid_argument("replay: times is " + std::to_string(times) + ", expected at least 0");
  const Handle exec = handle(graph_exec, "replay: graph_exec");
  const Driver& cuda = driver();
  for (std::int64_t i = 0; i < times; ++i) {
    const Result result = cuda.graph_launch(exec, reinterpret_cast<Handle>(stream));
    if (result != 0) cuda.check(result, ("cuGraphLaunch after " + std::to_string(i) + " launches").c_str());
    if (i % kBetween == kBetween - 1) between();
  }
}

void bind_driver(py::module_& m) {
  m.def("driver_version", &driver_version, "The CUDA version of the driver; see fastgan.driver.");
  m.def("graph_nodes", &graph_nodes, py::arg("graph"), "Nodes of a CUgraph by kind; see fastgan.driver.nodes.");
  m.def(
      "replay",
      [](std::uintptr_t graph_exec, std::uintptr_t stream, std::int64_t times) {
        py::gil_scoped_release unlocked;
        replay(graph_exec, stream, times, [] {
          py::gil_scoped_acquire locked;
          if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C
        });
      },
      py::arg("graph_exec"), py::arg("stream"), py::arg("times"),
      "Launch a CUgraphExec many times, without the interpreter; see fastgan.driver.replay.");
}

}  // namespace fastgan
