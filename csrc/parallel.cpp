#include "parallel.hpp"

#include <dlfcn.h>

namespace fastgan {

void run_team(void (*body)(void*), void* data, int threads) {
  // libgomp's entry behind `#pragma omp parallel`: torch loads its copy for all to see, and a second one linked here
  // would bring a pool of its own to fight for the same cores. 0: no binding of threads asked for.
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel != nullptr) {
    parallel(body, data, static_cast<unsigned>(threads), 0);
  } else {
    body(data);
  }
}

}  // namespace fastgan
