#include "philox.hpp"

#include "clones.hpp"

namespace fastgan {

FASTGAN_CLONES void philox(std::int64_t* out, std::size_t rows, std::size_t quads, std::uint32_t first_row,
                           std::uint32_t low, std::uint32_t high, std::uint32_t key0, std::uint32_t key1) {
  for (std::size_t r = 0; r < rows; ++r) {
    std::int64_t* line = out + r * quads * 4;
    for (std::size_t q = 0; q < quads; ++q) {
      std::uint32_t c0 = static_cast<std::uint32_t>(q), c1 = first_row + static_cast<std::uint32_t>(r);
      std::uint32_t c2 = low, c3 = high;
      philox_words(c0, c1, c2, c3, key0, key1);
      line[4 * q] = c0;
      line[4 * q + 1] = c1;
      line[4 * q + 2] = c2;
      line[4 * q + 3] = c3;
    }
  }
}

}  // namespace fastgan
