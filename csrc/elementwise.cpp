#include "elementwise.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "clones.hpp"

namespace fastgan {
namespace {

constexpr std::int64_t kGrain = 1 << 14;  // elements below which another thread does not pay: bench_steps
constexpr std::int64_t kLanes = 16;       // partial sums that one vector register or two hold
constexpr float kTanh[] = {-0.333333328f, 0.133332272f, -0.0539337492f, 0.0214724258f,
                           -0.00694633368f};  // of x^3, x^5, ...: see tanh_of

// As torch has them: of ReLU, -inf is 0 and not a number stays what it is.
template <typename T>
[[gnu::always_inline]] inline T leaky_relu(T z, T slope) {
  return z < T(0) ? (slope == T(0) ? T(0) : z * slope) : z;
}

// Bodies are templates that the clones below take in, one set for each processor and type.
template <typename T>
[[gnu::always_inline]] inline void bias_act_body(const T* src, T* dst, const T* bias, std::int64_t begin,
                                                 std::int64_t end, std::int64_t channels, std::int64_t inner, T slope) {
  for (std::int64_t i = begin; i < end; ++i) {  // rows where inner is 1, else rows * channels
    const T* from = src + i * (inner == 1 ? channels : inner);
    T* to = dst + i * (inner == 1 ? channels : inner);
    if (inner == 1) {
      if (bias == nullptr) {
        for (std::int64_t j = 0; j < channels; ++j) to[j] = leaky_relu(from[j], slope);
      } else {
        for (std::int64_t j = 0; j < channels; ++j) to[j] = leaky_relu(from[j] + bias[j], slope);
      }
    } else {
      const T b = bias == nullptr ? T(0) : bias[i % channels];
      for (std::int64_t j = 0; j < inner; ++j) to[j] = leaky_relu(from[j] + b, slope);
    }
  }
}

[[gnu::always_inline]] inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

[[gnu::always_inline]] inline float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// |error| below 2 ulp. Below 1/2 an odd polynomial, fitted to tanh at Chebyshev points; above, 1 - 2 / (exp(2|x|) + 1)
// with exp by its series around the nearest multiple of log 2.
[[gnu::always_inline]] inline float tanh_of(float x) {
  const float size = std::abs(x), z = x * x;
  const float near = x + x * z * (kTanh[0] + z * (kTanh[1] + z * (kTanh[2] + z * (kTanh[3] + z * kTanh[4]))));
  const float twice = std::min(2 * size, 20.0f);  // beyond, tanh is 1 in float
  const float turns = twice * 1.44269504f + 0.5f;
  const std::int32_t n = static_cast<std::int32_t>(turns);
  const float k = static_cast<float>(n);
  const float r = (twice - k * 0.693359375f) + k * 2.12194440e-4f;  // log 2 in two parts, the first of 12 bits
  const float e = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r / 720.0f)))));
  const float far = 1 - 2 / (e * from_bits(static_cast<std::uint32_t>(n + 127) << 23) + 1);
  // chosen by bits: a branch would keep the loop from being vectorised
  const std::uint32_t below = 0 - static_cast<std::uint32_t>(size < 0.5f), sign = bits_of(x) & 0x80000000;
  return from_bits((bits_of(near) & below) | ((bits_of(far) & ~below) | (sign & ~below)));
}

[[gnu::always_inline]] inline double tanh_of(double x) { return std::tanh(x); }

template <typename T>
[[gnu::always_inline]] inline void bias_tanh_body(const T* src, T* dst, const T* bias, std::int64_t begin,
                                                  std::int64_t end, std::int64_t channels, std::int64_t inner) {
  const std::int64_t line = inner == 1 ? channels : inner;  // rows where inner is 1, else rows * channels
  for (std::int64_t i = begin; i < end; ++i) {
    const T* from = src + i * line;
    T* to = dst + i * line;
    if (bias == nullptr) {
      for (std::int64_t j = 0; j < line; ++j) to[j] = tanh_of(from[j]);
    } else if (inner == 1) {
      for (std::int64_t j = 0; j < line; ++j) to[j] = tanh_of(from[j] + bias[j]);
    } else {
      const T b = bias[i % channels];
      for (std::int64_t j = 0; j < line; ++j) to[j] = tanh_of(from[j] + b);
    }
  }
}

template <typename T>
[[gnu::always_inline]] inline void mask_mul_body(const T* src, T* dst, const T* out, std::int64_t begin,
                                                 std::int64_t end, T slope) {
  for (std::int64_t i = begin; i < end; ++i) dst[i] = out[i] > T(0) ? src[i] : src[i] * slope;
}

template <typename T>
[[gnu::always_inline]] inline void outer_mask_body(const T* seed, const T* weight, const T* out, T* dst,
                                                   std::int64_t begin, std::int64_t end, std::int64_t cols, T slope) {
  for (std::int64_t i = begin; i < end; ++i) {
    const T s = seed[i];
    for (std::int64_t j = 0; j < cols; ++j) {
      const T u = s * weight[j];
      dst[i * cols + j] = out[i * cols + j] > T(0) ? u : u * slope;
    }
  }
}

template <typename T>
[[gnu::always_inline]] inline void mix_body(const T* alpha, const T* a, const T* b, T* dst, std::int64_t begin,
                                            std::int64_t end, std::int64_t cols) {
  for (std::int64_t i = begin; i < end; ++i) {
    const T w = alpha[i], v = T(1) - w;
    for (std::int64_t j = i * cols; j < (i + 1) * cols; ++j) dst[j] = w * a[j] + v * b[j];
  }
}

template <typename T>
[[gnu::always_inline]] inline void scale_add_body(const T* scale, T* a, const T* r, std::int64_t begin,
                                                  std::int64_t end, std::int64_t cols) {
  for (std::int64_t i = begin; i < end; ++i) {
    const T c = scale[i];
    for (std::int64_t j = i * cols; j < (i + 1) * cols; ++j) a[j] = c * a[j] + r[j];
  }
}

template <typename T>
[[gnu::always_inline]] inline T sum_of(const T* x, std::int64_t n) {
  T lanes[kLanes] = {};
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (std::int64_t k = 0; k < kLanes; ++k) lanes[k] += x[j + k];
  T sum = 0;
  for (; j < n; ++j) sum += x[j];
  for (const T lane : lanes) sum += lane;
  return sum;
}

// Channels [begin, end): a thread owns whole columns, so that the order of the sum does not depend on the threads. The
// halves of the rows are summed apart: where they are real and fake samples whose terms cancel, they cancel exactly.
template <typename T>
[[gnu::always_inline]] inline void channel_sum_body(const T* src, const T* weight, T* dst, std::int64_t begin,
                                                    std::int64_t end, std::int64_t rows, std::int64_t channels,
                                                    std::int64_t inner) {
  constexpr std::int64_t kBlock = 256;
  for (std::int64_t block = begin; block < end; block += kBlock) {
    const std::int64_t width = std::min(kBlock, end - block);
    T sums[2][kBlock] = {};
    for (std::int64_t i = 0; i < rows; ++i) {
      T* to = sums[2 * i >= rows];
      const T w = weight == nullptr ? T(1) : weight[i];
      const T* from = src + (i * channels + block) * inner;
      if (inner == 1) {
        for (std::int64_t c = 0; c < width; ++c) to[c] += w * from[c];
      } else {
        for (std::int64_t c = 0; c < width; ++c) to[c] += w * sum_of(from + c * inner, inner);
      }
    }
    for (std::int64_t c = 0; c < width; ++c) dst[block + c] = sums[0][c] + sums[1][c];
  }
}

template <typename T>
[[gnu::always_inline]] inline void penalty_body(const T* g, T* dst, T* rows_value, std::int64_t begin, std::int64_t end,
                                                std::int64_t cols, bool norm, T weight, T target, T scale, bool add) {
  for (std::int64_t i = begin; i < end; ++i) {
    const T* from = g + i * cols;
    T* to = dst + i * cols;
    T lanes[kLanes] = {};
    std::int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes)
      for (std::int64_t k = 0; k < kLanes; ++k) lanes[k] += from[j + k] * from[j + k];
    T squared = 0;
    for (; j < cols; ++j) squared += from[j] * from[j];
    for (const T lane : lanes) squared += lane;
    T factor = 2 * weight * scale;
    if (norm) {
      const T length = std::sqrt(squared + std::numeric_limits<T>::min());
      rows_value[i] = weight * (length - target) * (length - target);
      factor *= (length - target) / length;
    } else {
      rows_value[i] = weight * squared;
    }
    if (add) {
      for (j = 0; j < cols; ++j) to[j] += factor * from[j];
    } else {
      for (j = 0; j < cols; ++j) to[j] = factor * from[j];
    }
  }
}

#define FASTGAN_CLONES_OF(T)                                                                                         \
  FASTGAN_CLONES void bias_act_part(const T* src, T* dst, const T* bias, std::int64_t begin, std::int64_t end,       \
                                    std::int64_t channels, std::int64_t inner, T slope) {                            \
    bias_act_body(src, dst, bias, begin, end, channels, inner, slope);                                               \
  }                                                                                                                  \
  FASTGAN_CLONES void bias_tanh_part(const T* src, T* dst, const T* bias, std::int64_t begin, std::int64_t end,      \
                                     std::int64_t channels, std::int64_t inner) {                                    \
    bias_tanh_body(src, dst, bias, begin, end, channels, inner);                                                     \
  }                                                                                                                  \
  FASTGAN_CLONES void mask_mul_part(const T* src, T* dst, const T* out, std::int64_t begin, std::int64_t end,        \
                                    T slope) {                                                                       \
    mask_mul_body(src, dst, out, begin, end, slope);                                                                 \
  }                                                                                                                  \
  FASTGAN_CLONES void outer_mask_part(const T* seed, const T* weight, const T* out, T* dst, std::int64_t begin,      \
                                      std::int64_t end, std::int64_t cols, T slope) {                                \
    outer_mask_body(seed, weight, out, dst, begin, end, cols, slope);                                                \
  }                                                                                                                  \
  FASTGAN_CLONES void mix_part(const T* alpha, const T* a, const T* b, T* dst, std::int64_t begin, std::int64_t end, \
                               std::int64_t cols) {                                                                  \
    mix_body(alpha, a, b, dst, begin, end, cols);                                                                    \
  }                                                                                                                  \
  FASTGAN_CLONES void scale_add_part(const T* scale, T* a, const T* r, std::int64_t begin, std::int64_t end,         \
                                     std::int64_t cols) {                                                            \
    scale_add_body(scale, a, r, begin, end, cols);                                                                   \
  }                                                                                                                  \
  FASTGAN_CLONES void channel_sum_part(const T* src, const T* weight, T* dst, std::int64_t begin, std::int64_t end,  \
                                       std::int64_t rows, std::int64_t channels, std::int64_t inner) {               \
    channel_sum_body(src, weight, dst, begin, end, rows, channels, inner);                                           \
  }                                                                                                                  \
  FASTGAN_CLONES void penalty_part(const T* g, T* dst, T* rows_value, std::int64_t begin, std::int64_t end,          \
                                   std::int64_t cols, bool norm, T weight, T target, T scale, bool add) {            \
    penalty_body(g, dst, rows_value, begin, end, cols, norm, weight, target, scale, add);                            \
  }

FASTGAN_CLONES_OF(float)
FASTGAN_CLONES_OF(double)

std::int64_t grain(std::int64_t elements_per_item) { return std::max<std::int64_t>(1, kGrain / elements_per_item); }

}  // namespace

template <typename T>
void bias_act(const T* src, T* dst, const T* bias, std::int64_t rows, std::int64_t channels, std::int64_t inner,
              T slope, int threads) {
  const std::int64_t items = inner == 1 ? rows : rows * channels;
  parallel_for(items, grain(inner == 1 ? channels : inner), threads, [=](std::int64_t begin, std::int64_t end) {
    bias_act_part(src, dst, bias, begin, end, channels, inner, slope);
  });
}

template <typename T>
void bias_tanh(const T* src, T* dst, const T* bias, std::int64_t rows, std::int64_t channels, std::int64_t inner,
               int threads) {
  const std::int64_t items = inner == 1 ? rows : rows * channels;
  parallel_for(items, grain(8 * (inner == 1 ? channels : inner)), threads, [=](std::int64_t begin, std::int64_t end) {
    bias_tanh_part(src, dst, bias, begin, end, channels, inner);
  });
}

template <typename T>
void mask_mul(const T* src, T* dst, const T* out, std::int64_t n, T slope, int threads) {
  parallel_for(n, kGrain, threads,
               [=](std::int64_t begin, std::int64_t end) { mask_mul_part(src, dst, out, begin, end, slope); });
}

template <typename T>
void outer_mask(const T* seed, const T* weight, const T* out, T* dst, std::int64_t rows, std::int64_t cols, T slope,
                int threads) {
  parallel_for(rows, grain(cols), threads, [=](std::int64_t begin, std::int64_t end) {
    outer_mask_part(seed, weight, out, dst, begin, end, cols, slope);
  });
}

template <typename T>
void mix(const T* alpha, const T* a, const T* b, T* dst, std::int64_t rows, std::int64_t cols, int threads) {
  parallel_for(rows, grain(cols), threads,
               [=](std::int64_t begin, std::int64_t end) { mix_part(alpha, a, b, dst, begin, end, cols); });
}

template <typename T>
void scale_add(const T* scale, T* a, const T* r, std::int64_t rows, std::int64_t cols, int threads) {
  parallel_for(rows, grain(cols), threads,
               [=](std::int64_t begin, std::int64_t end) { scale_add_part(scale, a, r, begin, end, cols); });
}

template <typename T>
void channel_sum(const T* src, const T* weight, T* dst, std::int64_t rows, std::int64_t channels, std::int64_t inner,
                 int threads) {
  const std::int64_t columns = std::max<std::int64_t>(64, grain(rows * inner));  // whole cache lines of a row
  parallel_for(channels, columns, threads, [=](std::int64_t begin, std::int64_t end) {
    channel_sum_part(src, weight, dst, begin, end, rows, channels, inner);
  });
}

template <typename T>
void penalty(const T* g, T* dst, T* value, T* rows_value, std::int64_t rows, std::int64_t cols, bool norm, T weight,
             T target, T scale, bool add, int threads) {
  parallel_for(rows, grain(cols), threads, [=](std::int64_t begin, std::int64_t end) {
    penalty_part(g, dst, rows_value, begin, end, cols, norm, weight, target, scale, add);
  });
  double sum = 0;
  for (std::int64_t i = 0; i < rows; ++i) sum += rows_value[i];
  *value = static_cast<T>(sum / rows);
}

namespace {

template <typename T>
T softplus(T x) {
  return std::max(x, T(0)) + std::log1p(std::exp(-std::abs(x)));
}

template <typename T>
T sigmoid(T x) {
  const T e = std::exp(-std::abs(x));
  return (x >= T(0) ? T(1) : e) / (T(1) + e);
}

}  // namespace

template <typename T>
void discriminator_loss(Loss kind, const T* real, const T* fake, T* real_scale, T* fake_scale, T* loss, T* real_mean,
                        T* fake_mean, std::int64_t n) {
  const T mean = T(1) / static_cast<T>(n);
  double sum = 0, real_sum = 0, fake_sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const T r = real[i], f = fake[i];
    T value = 0, dr = 0, df = 0;
    switch (kind) {
      case Loss::minimax:
      case Loss::non_saturating:
        value = softplus(-r) + softplus(f), dr = -sigmoid(-r), df = sigmoid(f);
        break;
      case Loss::wasserstein:
        value = f - r, dr = T(-1), df = T(1);
        break;
      case Loss::hinge:
        value = std::max(T(1) - r, T(0)) + std::max(T(1) + f, T(0));
        dr = r < T(1) ? T(-1) : T(0), df = f > T(-1) ? T(1) : T(0);
        break;
      case Loss::least_squares:
        value = ((r - 1) * (r - 1) + f * f) / 2, dr = r - 1, df = f;
        break;
      case Loss::relativistic:
        value = softplus(f - r), df = sigmoid(f - r), dr = -df;
        break;
    }
    real_scale[i] = dr * mean, fake_scale[i] = df * mean;
    sum += value, real_sum += r, fake_sum += f;
  }
  *loss = static_cast<T>(sum / n), *real_mean = static_cast<T>(real_sum / n), *fake_mean = static_cast<T>(fake_sum / n);
}

template <typename T>
void generator_loss(Loss kind, const T* fake, const T* real, T* fake_scale, T* loss, std::int64_t n) {
  const T mean = T(1) / static_cast<T>(n);
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const T f = fake[i];
    T value = 0, df = 0;
    switch (kind) {
      case Loss::minimax:
        value = -softplus(f), df = -sigmoid(f);
        break;
      case Loss::non_saturating:
        value = softplus(-f), df = -sigmoid(-f);
        break;
      case Loss::wasserstein:
      case Loss::hinge:
        value = -f, df = T(-1);
        break;
      case Loss::least_squares:
        value = (f - 1) * (f - 1) / 2, df = f - 1;
        break;
      case Loss::relativistic:
        value = softplus(real[i] - f), df = -sigmoid(real[i] - f);
        break;
    }
    fake_scale[i] = df * mean;
    sum += value;
  }
  *loss = static_cast<T>(sum / n);
}

#define FASTGAN_INSTANTIATE(T)                                                                       \
  template void bias_act(const T*, T*, const T*, std::int64_t, std::int64_t, std::int64_t, T, int);  \
  template void bias_tanh(const T*, T*, const T*, std::int64_t, std::int64_t, std::int64_t, int);    \
  template void mask_mul(const T*, T*, const T*, std::int64_t, T, int);                              \
  template void outer_mask(const T*, const T*, const T*, T*, std::int64_t, std::int64_t, T, int);    \
  template void mix(const T*, const T*, const T*, T*, std::int64_t, std::int64_t, int);              \
  template void scale_add(const T*, T*, const T*, std::int64_t, std::int64_t, int);                  \
  template void channel_sum(const T*, const T*, T*, std::int64_t, std::int64_t, std::int64_t, int);  \
  template void penalty(const T*, T*, T*, T*, std::int64_t, std::int64_t, bool, T, T, T, bool, int); \
  template void discriminator_loss(Loss, const T*, const T*, T*, T*, T*, T*, T*, std::int64_t);      \
  template void generator_loss(Loss, const T*, const T*, T*, T*, std::int64_t);

FASTGAN_INSTANTIATE(float)
FASTGAN_INSTANTIATE(double)

}  // namespace fastgan
