#pragma once
#include <cstdint>

namespace fastgan {

// Whether matrix_product runs on this processor, and is what should: where the vendor's library that torch calls uses
// half of the vector width (AVX-512 on AMD). The same on every run: which product runs decides the last bits.
bool has_matrix_product();

// c = a b in float, [m, n] = [m, k] [k, n], rows of c at distance n. a is stored as [m, k] with rows at distance lda,
// or as [k, m] where a_transposed; b as [k, n] or as [n, k]. The order of a sum depends on k alone, not on the threads.
void matrix_product(const float* a, std::int64_t lda, bool a_transposed, const float* b, std::int64_t ldb,
                    bool b_transposed, float* c, std::int64_t m, std::int64_t n, std::int64_t k, int threads);

}  // namespace fastgan
