#include "gather.hpp"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

#include "clones.hpp"

namespace fastgan {
namespace {

constexpr std::size_t kElementsPerThread = 1 << 19;  // below, starting a thread costs more than it saves: bench_gather
constexpr std::size_t kPrefetch = 4096;  // bytes of the next row; rows are at random places, the rest of one is not

// AVX-512 is no faster here: the rows' way from memory is what takes the time.
FASTGAN_CLONES void copy_rows(const std::uint8_t* rows, std::size_t row_size, const std::int64_t* index,
                              const bool* flips, float* out, std::size_t begin, std::size_t end, std::size_t width,
                              float scale, float offset) {
  for (std::size_t i = begin; i < end; ++i) {
    const std::uint8_t* from = rows + static_cast<std::size_t>(index[i]) * row_size;
    float* to = out + i * row_size;
    if (i + 1 < end) {
      const std::uint8_t* next = rows + static_cast<std::size_t>(index[i + 1]) * row_size;
      for (std::size_t j = 0; j < std::min(row_size, kPrefetch); j += 64) __builtin_prefetch(next + j);
    }
    if (flips == nullptr || !flips[i]) {
      for (std::size_t j = 0; j < row_size; ++j) to[j] = static_cast<float>(from[j]) * scale + offset;
    } else {
      for (std::size_t line = 0; line < row_size; line += width)
        for (std::size_t j = 0; j < width; ++j)
          to[line + j] = static_cast<float>(from[line + width - 1 - j]) * scale + offset;
    }
  }
}

}  // namespace

void gather(const std::uint8_t* rows, std::size_t row_size, const std::int64_t* index, const bool* flips, float* out,
            std::size_t count, std::size_t width, float scale, float offset, int threads) {
  const auto part = [=](std::size_t begin, std::size_t end) {
    copy_rows(rows, row_size, index, flips, out, begin, end, width, scale, offset);
  };
  const std::size_t worth = count * row_size / kElementsPerThread;
  const std::size_t parts = std::max<std::size_t>(1, std::min({worth, count, static_cast<std::size_t>(threads)}));
  std::vector<std::thread> workers;
  workers.reserve(parts);
  std::size_t begin = 0;
  for (std::size_t k = 1; k < parts; ++k) {
    const std::size_t end = count * k / parts;
    try {
      workers.emplace_back(part, begin, end);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: the caller's own does the rest
    }
    begin = end;
  }
  part(begin, count);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace fastgan
