#pragma once
#include <cstddef>
#include <cstdint>

namespace fastgan {

// Philox4x32-10 (Salmon et al. 2011): out[r, 4q .. 4q+3] holds the four words of counter (q, first_row + r, low, high)
// under key (key0, key1), each in the low half of an int64.
void philox(std::int64_t* out, std::size_t rows, std::size_t quads, std::uint32_t first_row, std::uint32_t low,
            std::uint32_t high, std::uint32_t key0, std::uint32_t key1);

}  // namespace fastgan
