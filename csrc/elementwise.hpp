#pragma once
#include <cstdint>

#include "parallel.hpp"

// What runs between the matrix products of a plan, in one pass each; fastgan/steps.py has the same in torch ops.
// Arrays are contiguous; a destination may be the same array as a source. T is float or double.
namespace fastgan {

// dst = leaky_relu(src + bias[channel]) over [rows, channels, inner]; bias may be null; slope 1 is the identity.
template <typename T>
void bias_act(const T* src, T* dst, const T* bias, std::int64_t rows, std::int64_t channels, std::int64_t inner,
              T slope, int threads);

// dst = tanh(src + bias[channel]) over [rows, channels, inner]; bias may be null.
template <typename T>
void bias_tanh(const T* src, T* dst, const T* bias, std::int64_t rows, std::int64_t channels, std::int64_t inner,
               int threads);

// dst = src * leaky_relu'(z), where out = leaky_relu(z) has the sign of z.
template <typename T>
void mask_mul(const T* src, T* dst, const T* out, std::int64_t n, T slope, int threads);

// dst[i, j] = seed[i] * weight[j] * leaky_relu'(z[i, j]); out as above.
template <typename T>
void outer_mask(const T* seed, const T* weight, const T* out, T* dst, std::int64_t rows, std::int64_t cols, T slope,
                int threads);

// dst[i] = alpha[i] * a[i] + (1 - alpha[i]) * b[i] over rows of cols.
template <typename T>
void mix(const T* alpha, const T* a, const T* b, T* dst, std::int64_t rows, std::int64_t cols, int threads);

// a[i] = scale[i] * a[i] + r[i] over rows of cols.
template <typename T>
void scale_add(const T* scale, T* a, const T* r, std::int64_t rows, std::int64_t cols, int threads);

// dst[channel] = sum of weight[row] * src over rows and inner; weight may be null. In a fixed order.
template <typename T>
void channel_sum(const T* src, const T* weight, T* dst, std::int64_t rows, std::int64_t channels, std::int64_t inner,
                 int threads);

// A gradient penalty of rows g: weight * (|g| - target)^2 with norm, weight * |g|^2 without. Writes (or adds) scale
// times its derivative to dst, and its mean over the rows to value.
template <typename T>
void penalty(const T* g, T* dst, T* value, T* rows_value, std::int64_t rows, std::int64_t cols, bool norm, T weight,
             T target, T scale, bool add, int threads);

enum class Loss { minimax, non_saturating, wasserstein, hinge, least_squares, relativistic };  // as fastgan.losses

// The discriminator's loss of n real and n fake logits: its derivatives to real_scale and fake_scale, its mean and the
// mean logits to loss, real_mean and fake_mean.
template <typename T>
void discriminator_loss(Loss kind, const T* real, const T* fake, T* real_scale, T* fake_scale, T* loss, T* real_mean,
                        T* fake_mean, std::int64_t n);

// The generator's loss of n fake logits (and n real ones where the loss compares): its derivative and its mean.
template <typename T>
void generator_loss(Loss kind, const T* fake, const T* real, T* fake_scale, T* loss, std::int64_t n);

}  // namespace fastgan
