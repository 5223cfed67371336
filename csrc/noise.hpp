#pragma once
#include <cstddef>
#include <cstdint>

namespace fastgan {

struct NoiseKey {  // of the counters (q, first_row + r, low, high), see philox.hpp
  std::uint32_t first_row, low, high, key0, key1;

  NoiseKey(std::uint32_t row, std::uint64_t step, std::uint32_t stream, std::uint64_t seed)
      : first_row(row),
        low(static_cast<std::uint32_t>(step)),
        high(static_cast<std::uint32_t>((step >> 32 & 0xFFFF) | (stream << 16))),
        key0(static_cast<std::uint32_t>(seed)),
        key1(static_cast<std::uint32_t>(seed >> 32)) {}
};

// out[r * stride + c] for r < rows, c < cols: what fastgan.noise.normal and uniform say of row r and column c, up to
// the last bits of the fp64 logarithm, sine and cosine in the first, to the bit in the second. T is float or double.
template <typename T>
void normal(T* out, std::size_t rows, std::size_t cols, std::size_t stride, const NoiseKey& key, int threads);
template <typename T>
void uniform(T* out, std::size_t rows, std::size_t cols, std::size_t stride, const NoiseKey& key, int threads);

// out[r * stride]: fastgan.noise.integers, to the bit.
void integers(std::int64_t* out, std::size_t rows, std::size_t stride, std::int64_t high, const NoiseKey& key,
              int threads);

}  // namespace fastgan
