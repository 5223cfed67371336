#include "product.hpp"

#include <algorithm>
#include <vector>

#include "parallel.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTGAN_HAS_AVX512 1
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#define FASTGAN_HAS_AVX512 0
#endif

// The scheme of Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication": tiles of the result
// that fit the registers, over operands that were packed into the order in which a tile reads them.
namespace fastgan {

#if FASTGAN_HAS_AVX512

#define FASTGAN_AVX512 __attribute__((target("avx512f")))

namespace {

constexpr std::int64_t kRows = 14, kCols = 32;  // of a tile: 28 registers of sums, 2 of b, 1 of a
constexpr std::int64_t kDepth = 256;            // of a packed block: a panel of b is 32 KB
constexpr std::int64_t kBlock = 12 * kRows;     // rows of a that are packed at a time: 172 KB
constexpr double kWorth = 1 << 19;              // multiplications for which another thread pays: bench_steps

std::int64_t panels(std::int64_t n, std::int64_t width) { return (n + width - 1) / width; }

__mmask16 first(std::int64_t n) { return static_cast<__mmask16>((1u << std::clamp<std::int64_t>(n, 0, 16)) - 1); }

FASTGAN_AVX512 inline void transpose(__m512 (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d lower = _mm512_castps_pd(t[i + j]), upper = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lower, upper));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lower, upper));
    }
  }
  // r[4 q + c] holds, in lane l, column 4 l + c of rows 4 q .. 4 q + 3
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88),
                 odd01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    t[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// to[d * width + i] = from[i * ld + d] for `have` <= width lines i (16 at most) and d < depth; zero for lines beyond.
// Writes 16 values at each d: what is beyond the width is written over by the next, or lies in the buffer's slack.
FASTGAN_AVX512 void pack_lines(const float* from, std::int64_t ld, std::int64_t have, std::int64_t depth, float* to,
                               std::int64_t width) {
  for (std::int64_t d = 0; d < depth; d += 16) {
    const std::int64_t left = std::min<std::int64_t>(16, depth - d);
    const __mmask16 mask = first(left);
    __m512 r[16];
    for (std::int64_t i = 0; i < 16; ++i)
      r[i] = i < have ? _mm512_maskz_loadu_ps(mask, from + i * ld + d) : _mm512_setzero_ps();
    transpose(r);
    for (std::int64_t t = 0; t < left; ++t) _mm512_storeu_ps(to + (d + t) * width, r[t]);
  }
}

// The same where the lines are stored across: to[d * width + i] = from[d * ld + i].
FASTGAN_AVX512 void pack_across(const float* from, std::int64_t ld, std::int64_t have, std::int64_t depth, float* to,
                                std::int64_t width) {
  const __mmask16 mask = first(have);
  for (std::int64_t d = 0; d < depth; ++d) _mm512_storeu_ps(to + d * width, _mm512_maskz_loadu_ps(mask, from + d * ld));
}

// A tile: c[i, j] (+)= sum over d of a[d, i] b[d, j], of which `rows` x `cols` are wanted.
FASTGAN_AVX512 void tile(const float* a, const float* b, std::int64_t depth, float* c, std::int64_t ldc,
                         std::int64_t rows, std::int64_t cols, bool add) {
  __m512 sums[kRows][2];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (std::int64_t d = 0; d < depth; ++d) {
    const __m512 left = _mm512_loadu_ps(b), right = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const __m512 x = _mm512_set1_ps(a[i]);
      sums[i][0] = _mm512_fmadd_ps(x, left, sums[i][0]);
      sums[i][1] = _mm512_fmadd_ps(x, right, sums[i][1]);
    }
    a += kRows;
    b += kCols;
  }
  const __mmask16 masks[2] = {first(cols), first(cols - 16)};
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
    for (int h = 0; h < 2; ++h) {
      float* to = c + i * ldc + 16 * h;
      const __m512 sum = add ? _mm512_add_ps(_mm512_maskz_loadu_ps(masks[h], to), sums[i][h]) : sums[i][h];
      _mm512_mask_storeu_ps(to, masks[h], sum);
    }
  }
}

struct Operands {
  const float *a, *b;
  float* c;
  std::int64_t lda, ldb, m, n, k;
  bool a_transposed, b_transposed;
};

// Rows [m0, m1) and columns [n0, n1) of c.
void part(const Operands& o, std::int64_t m0, std::int64_t m1, std::int64_t n0, std::int64_t n1) {
  thread_local std::vector<float> a_packed, b_packed;
  const std::int64_t b_panels = panels(n1 - n0, kCols);
  a_packed.resize(kBlock * kDepth + 16);
  b_packed.resize(std::max<std::size_t>(b_packed.size(), b_panels * kCols * kDepth + 16));
  for (std::int64_t d = 0; d < o.k; d += kDepth) {
    const std::int64_t depth = std::min(kDepth, o.k - d);
    for (std::int64_t p = 0; p < b_panels; ++p) {
      for (std::int64_t half = 0; half < 2; ++half) {
        const std::int64_t j = n0 + p * kCols + 16 * half;
        const std::int64_t have = std::clamp<std::int64_t>(n1 - j, 0, 16);
        float* to = b_packed.data() + p * kCols * depth + 16 * half;
        if (o.b_transposed)
          pack_lines(o.b + j * o.ldb + d, o.ldb, have, depth, to, kCols);
        else
          pack_across(o.b + d * o.ldb + j, o.ldb, have, depth, to, kCols);
      }
    }
    for (std::int64_t i0 = m0; i0 < m1; i0 += kBlock) {
      const std::int64_t a_panels = panels(std::min(kBlock, m1 - i0), kRows);
      for (std::int64_t q = 0; q < a_panels; ++q) {
        const std::int64_t i = i0 + q * kRows, have = std::min(kRows, m1 - i);
        float* to = a_packed.data() + q * kRows * depth;
        if (o.a_transposed)
          pack_across(o.a + d * o.lda + i, o.lda, have, depth, to, kRows);
        else
          pack_lines(o.a + i * o.lda + d, o.lda, have, depth, to, kRows);
      }
      for (std::int64_t p = 0; p < b_panels; ++p)
        for (std::int64_t q = 0; q < a_panels; ++q) {
          const std::int64_t i = i0 + q * kRows, j = n0 + p * kCols;
          tile(a_packed.data() + q * kRows * depth, b_packed.data() + p * kCols * depth, depth, o.c + i * o.n + j, o.n,
               std::min(kRows, m1 - i), std::min(kCols, n1 - j), d > 0);
        }
    }
  }
}

}  // namespace

bool has_matrix_product() { return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f"); }

void matrix_product(const float* a, std::int64_t lda, bool a_transposed, const float* b, std::int64_t ldb,
                    bool b_transposed, float* c, std::int64_t m, std::int64_t n, std::int64_t k, int threads) {
  const Operands o{a, b, c, lda, ldb, m, n, k, a_transposed, b_transposed};
  const double work = static_cast<double>(m) * n * k;
  const std::int64_t team = std::clamp<std::int64_t>(static_cast<std::int64_t>(work / kWorth), 1, threads);
  // Threads share the longer side of c: each packs its own part of one operand and all of the other, shorter one.
  const bool by_rows = m >= n;
  const std::int64_t width = by_rows ? kRows : kCols, count = panels(by_rows ? m : n, width);
  const std::int64_t grain = panels(count, team);
  parallel_for(count, grain, static_cast<int>(team), [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t from = begin * width, to = std::min(end * width, by_rows ? m : n);
    if (by_rows)
      part(o, from, to, 0, n);
    else
      part(o, 0, m, from, to);
  });
}

#else

bool has_matrix_product() { return false; }

void matrix_product(const float*, std::int64_t, bool, const float*, std::int64_t, bool, float*, std::int64_t,
                    std::int64_t, std::int64_t, int) {}

#endif

}  // namespace fastgan
