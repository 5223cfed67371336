#include "noise.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "clones.hpp"
#include "parallel.hpp"
#include "philox.hpp"

namespace fastgan {
namespace {

constexpr std::size_t kTile = 64;  // counters at a time: everything about them stays in the first-level cache
constexpr std::size_t kGrain = 64 * kTile;  // counters worth waking another thread for

struct Words {
  std::uint32_t c[4][kTile];
};

// The words of `n` <= kTile counters from number `begin` on, counted along rows of `quads`.
FASTGAN_INLINE void words_of(Words& w, const NoiseKey& key, std::size_t quads, std::size_t begin, std::size_t n) {
  std::size_t row = begin / quads, q = begin % quads;
  for (std::size_t i = 0; i < kTile; ++i) {
    w.c[0][i] = static_cast<std::uint32_t>(q);
    w.c[1][i] = key.first_row + static_cast<std::uint32_t>(row);
    if (i < n && ++q == quads) q = 0, ++row;
  }
  for (std::size_t i = 0; i < kTile; ++i) {
    std::uint32_t c0 = w.c[0][i], c1 = w.c[1][i], c2 = key.low, c3 = key.high;
    philox_words(c0, c1, c2, c3, key.key0, key.key1);
    w.c[0][i] = c0;
    w.c[1][i] = c1;
    w.c[2][i] = c2;
    w.c[3][i] = c3;
  }
}

FASTGAN_INLINE std::uint64_t bits_of(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTGAN_INLINE double from_bits(std::uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr std::uint64_t kTwo52Bits = 0x4330000000000000;
constexpr double kTwo52 = 4503599627370496.0;

FASTGAN_INLINE double to_double(std::uint64_t below_two52) { return from_bits(below_two52 | kTwo52Bits) - kTwo52; }

// Natural logarithm of x in (0, 1): x = 2^k m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh(s) by its series,
// s = (m - 1) / (m + 1): |s| < 0.172, so that the first term left out is below 1e-18.
FASTGAN_INLINE double log_below_one(double x) {
  constexpr double kLn2 = 0.693147180559945309417, kLn2High = 0x1.62e42fep-1, kLn2Low = kLn2 - kLn2High;
  constexpr std::uint64_t kRootHalf = 0x3FE6A09E00000000;
  const std::uint64_t shifted = bits_of(x) + (0x3FF0000000000000 - kRootHalf);
  const double k = to_double(shifted >> 52) - 1023;
  const double f = from_bits((shifted & 0x000FFFFFFFFFFFFF) + kRootHalf) - 1;
  const double s = f / (2 + f), z = s * s;
  double series = 1.0 / 23;
  for (int n = 21; n >= 3; n -= 2) series = series * z + 1.0 / n;
  return k * kLn2High + (2 * s + (2 * s * z * series + k * kLn2Low));
}

// cos and sin of 2 pi v, 0 < v < 1: quarter turns are taken off, what is left (at most pi / 4) goes into their series.
FASTGAN_INLINE void turn(double v, double& cosine, double& sine) {
  constexpr double kHalfPi = 0x1.921fb544p+0, kHalfPiRest = 0x1.0b4611a626331p-34;  // 33 bits, and what follows
  const double rounded = 4 * v + 1.5 * kTwo52;  // the nearest quarter turn is in its last bits
  const std::uint64_t quarter = bits_of(rounded) & 3;
  const double n = rounded - 1.5 * kTwo52;
  const double y = (2 * M_PI) * v - n * kHalfPi - n * kHalfPiRest, z = y * y;
  double odd_series = -1.0 / (16 * 17), even_series = -1.0 / (15 * 16);
  for (int k = 14; k >= 4; k -= 2) odd_series = (1 + z * odd_series) * (-1.0 / (k * (k + 1)));
  for (int k = 13; k >= 3; k -= 2) even_series = (1 + z * even_series) * (-1.0 / (k * (k + 1)));
  const double s = y - y * z * ((1 + z * odd_series) * (1.0 / 6));
  const double c = 1 - 0.5 * z * (1 + z * even_series);
  const std::uint64_t odd = 0 - (quarter & 1);
  cosine = from_bits(((bits_of(c) & ~odd) | (bits_of(s) & odd)) ^ ((quarter + 1) & 2) << 62);
  sine = from_bits(((bits_of(s) & ~odd) | (bits_of(c) & odd)) ^ (quarter & 2) << 62);
}

FASTGAN_INLINE double open_unit(std::uint32_t word) { return (to_double(word) + 0.5) * 0x1p-32; }  // in (0, 1)

template <typename T>
struct Normal {
  FASTGAN_INLINE void operator()(const Words& w, T* values) const {  // Box and Muller
    for (std::size_t pair = 0; pair < 2; ++pair) {
      double x[kTile], y[kTile];
      for (std::size_t i = 0; i < kTile; ++i) {
        const double radius = std::sqrt(-2 * log_below_one(open_unit(w.c[2 * pair][i])));
        double cosine, sine;
        turn(open_unit(w.c[2 * pair + 1][i]), cosine, sine);
        x[i] = radius * cosine;
        y[i] = radius * sine;
      }
      for (std::size_t i = 0; i < kTile; ++i) {
        values[4 * i + 2 * pair] = static_cast<T>(x[i]);
        values[4 * i + 2 * pair + 1] = static_cast<T>(y[i]);
      }
    }
  }
};

template <typename T>
struct Uniform {
  FASTGAN_INLINE void operator()(const Words& w, T* values) const {
    for (std::size_t i = 0; i < kTile; ++i)
      for (std::size_t k = 0; k < 4; ++k)
        values[4 * i + k] = static_cast<T>(static_cast<std::int32_t>(w.c[k][i] >> 8)) * static_cast<T>(0x1p-24);
  }
};

template <typename T>
struct Rows {
  T* out;
  std::size_t cols, stride, quads;
};

template <template <typename> class Numbers, typename T>
FASTGAN_INLINE void fill(const Rows<T>& rows, const NoiseKey& key, std::size_t begin, std::size_t end) {
  for (; begin < end; begin += kTile) {
    const std::size_t n = std::min(kTile, end - begin);
    Words words;
    T values[4 * kTile];
    words_of(words, key, rows.quads, begin, n);
    Numbers<T>()(words, values);
    for (std::size_t i = 0; i < n;) {  // the part of the tile that is in one row
      const std::size_t row = (begin + i) / rows.quads, q = (begin + i) % rows.quads;
      const std::size_t run = std::min(n - i, rows.quads - q);
      const std::size_t count = std::min(4 * run, rows.cols - 4 * q);
      std::memcpy(rows.out + row * rows.stride + 4 * q, values + 4 * i, count * sizeof(T));
      i += run;
    }
  }
}

FASTGAN_CLONES void normal_part(const Rows<float>& rows, const NoiseKey& key, std::size_t begin, std::size_t end) {
  fill<Normal>(rows, key, begin, end);
}
FASTGAN_CLONES void normal_part(const Rows<double>& rows, const NoiseKey& key, std::size_t begin, std::size_t end) {
  fill<Normal>(rows, key, begin, end);
}
FASTGAN_CLONES void uniform_part(const Rows<float>& rows, const NoiseKey& key, std::size_t begin, std::size_t end) {
  fill<Uniform>(rows, key, begin, end);
}
FASTGAN_CLONES void uniform_part(const Rows<double>& rows, const NoiseKey& key, std::size_t begin, std::size_t end) {
  fill<Uniform>(rows, key, begin, end);
}
FASTGAN_CLONES void integers_part(const Rows<std::int64_t>& rows, std::int64_t high, const NoiseKey& key,
                                  std::size_t begin, std::size_t end) {
  for (; begin < end; begin += kTile) {
    const std::size_t n = std::min(kTile, end - begin);
    Words words;
    words_of(words, key, 1, begin, n);
    for (std::size_t i = 0; i < n; ++i)
      rows.out[(begin + i) * rows.stride] = static_cast<std::int64_t>(words.c[0][i]) * high >> 32;
  }
}

}  // namespace

template <typename T>
void normal(T* out, std::size_t rows, std::size_t cols, std::size_t stride, const NoiseKey& key, int threads) {
  const Rows<T> to{out, cols, stride, (cols + 3) / 4};
  parallel_for(rows * to.quads, kGrain, threads,
               [&](std::size_t begin, std::size_t end) { normal_part(to, key, begin, end); });
}

template <typename T>
void uniform(T* out, std::size_t rows, std::size_t cols, std::size_t stride, const NoiseKey& key, int threads) {
  const Rows<T> to{out, cols, stride, (cols + 3) / 4};
  parallel_for(rows * to.quads, 4 * kGrain, threads,
               [&](std::size_t begin, std::size_t end) { uniform_part(to, key, begin, end); });
}

void integers(std::int64_t* out, std::size_t rows, std::size_t stride, std::int64_t high, const NoiseKey& key,
              int threads) {
  const Rows<std::int64_t> to{out, 1, stride, 1};
  parallel_for(rows, 4 * kGrain, threads,
               [&](std::size_t begin, std::size_t end) { integers_part(to, high, key, begin, end); });
}

template void normal(float*, std::size_t, std::size_t, std::size_t, const NoiseKey&, int);
template void normal(double*, std::size_t, std::size_t, std::size_t, const NoiseKey&, int);
template void uniform(float*, std::size_t, std::size_t, std::size_t, const NoiseKey&, int);
template void uniform(double*, std::size_t, std::size_t, std::size_t, const NoiseKey&, int);

}  // namespace fastgan
