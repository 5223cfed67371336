#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>

namespace fastgan {

// Calls body(data) on up to `threads` threads of the OpenMP pool that torch loaded, the caller's own among them, and
// returns when all are done. Without such a pool, or inside one of its teams, the caller's own thread runs it alone.
void run_team(void (*body)(void*), void* data, int threads);

// fn(begin, end) for every chunk of `grain` items of [0, n), in no order: begin is a multiple of grain, end is at most
// n. Up to `threads` threads take chunks in turn; a single chunk, or a single thread, needs none but the caller's.
// fn must not throw.
template <typename Fn>
void parallel_for(std::size_t n, std::size_t grain, int threads, const Fn& fn) {
  struct Work {
    const Fn& fn;
    std::size_t n, grain;
    std::atomic<std::size_t> next;
  } work{fn, n, grain, {0}};
  const auto body = [](void* data) {
    Work& w = *static_cast<Work*>(data);
    for (;;) {
      const std::size_t begin = w.next.fetch_add(w.grain, std::memory_order_relaxed);
      if (begin >= w.n) return;
      w.fn(begin, std::min(w.n, begin + w.grain));
    }
  };
  const std::size_t chunks = (n + grain - 1) / grain;
  const int team = static_cast<int>(std::min<std::size_t>(chunks, static_cast<std::size_t>(std::max(threads, 1))));
  if (team > 1) {
    run_team(body, &work, team);
  } else {
    body(&work);
  }
}

}  // namespace fastgan
