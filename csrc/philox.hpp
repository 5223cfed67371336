#pragma once
#include <cstddef>
#include <cstdint>

#include "clones.hpp"

namespace fastgan {

// Philox4x32-10 (Salmon et al. 2011) of one counter, in place.
FASTGAN_INLINE void philox_words(std::uint32_t& c0, std::uint32_t& c1, std::uint32_t& c2, std::uint32_t& c3,
                                 std::uint32_t k0, std::uint32_t k1) {
  constexpr std::uint64_t kM0 = 0xD2511F53, kM1 = 0xCD9E8D57;
  constexpr std::uint32_t kW0 = 0x9E3779B9, kW1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = kM0 * c0, p1 = kM1 * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    k0 += kW0;
    k1 += kW1;
  }
}

// out[r, 4q .. 4q+3] holds the four words of counter (q, first_row + r, low, high) under key (key0, key1), each in the
// low half of an int64.
void philox(std::int64_t* out, std::size_t rows, std::size_t quads, std::uint32_t first_row, std::uint32_t low,
            std::uint32_t high, std::uint32_t key0, std::uint32_t key1);

}  // namespace fastgan
