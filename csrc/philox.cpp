#include "philox.hpp"

#include "clones.hpp"

namespace fastgan {

FASTGAN_CLONES void philox(std::int64_t* out, std::size_t rows, std::size_t quads, std::uint32_t first_row,
                           std::uint32_t low, std::uint32_t high, std::uint32_t key0, std::uint32_t key1) {
  constexpr std::uint64_t kM0 = 0xD2511F53, kM1 = 0xCD9E8D57;
  constexpr std::uint32_t kW0 = 0x9E3779B9, kW1 = 0xBB67AE85;
  for (std::size_t r = 0; r < rows; ++r) {
    std::int64_t* line = out + r * quads * 4;
    for (std::size_t q = 0; q < quads; ++q) {
      std::uint32_t c0 = static_cast<std::uint32_t>(q), c1 = first_row + static_cast<std::uint32_t>(r);
      std::uint32_t c2 = low, c3 = high, k0 = key0, k1 = key1;
      for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = kM0 * c0, p1 = kM1 * c2;
        c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<std::uint32_t>(p1);
        c3 = static_cast<std::uint32_t>(p0);
        k0 += kW0;
        k1 += kW1;
      }
      line[4 * q] = c0;
      line[4 * q + 1] = c1;
      line[4 * q + 2] = c2;
      line[4 * q + 3] = c3;
    }
  }
}

}  // namespace fastgan
