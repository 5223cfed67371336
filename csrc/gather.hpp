#pragma once
#include <cstddef>
#include <cstdint>

namespace fastgan {

// out[i, j] = float(rows[index[i], j]) * scale + offset, two roundings; lines of `width` are reversed where flips[i].
// Every index must be in range; flips may be null. Uses up to `threads` threads, fewer for little work.
void gather(const std::uint8_t* rows, std::size_t row_size, const std::int64_t* index, const bool* flips, float* out,
            std::size_t count, std::size_t width, float scale, float offset, int threads);

}  // namespace fastgan
