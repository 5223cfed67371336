#include "adam.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "clones.hpp"
#include "parallel.hpp"

namespace fastgan {
namespace {

using Block = AdamPass::Block;
using Decay = AdamPass::Decay;

constexpr std::int64_t kWorthATeam = 1 << 16;  // elements below which waking other threads costs more than it saves
constexpr std::size_t kLanes = 16;             // a fixed number, so that the sum is the same on every processor
constexpr std::size_t kSumGrain = 16, kUpdateGrain = 8;  // blocks at a time

template <typename T>
struct Job {
  const Block* blocks;
  const std::uint8_t* active;
  T *flat, *grad, *exp_avg, *exp_avg_sq, *average;
  std::uint16_t* low;
  double* sums;  // per block
  const double *rates, *roots;  // per parameter: lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)
  T beta2, rest1, rest2, eps, weight_decay, shrink, weight, clip;
  Decay decay;
  bool finite, zero_grad;
};

template <typename T>
FASTGAN_INLINE double square(T x) {
  return static_cast<double>(x) * static_cast<double>(x);
}

template <typename T>
FASTGAN_INLINE void sum_squares(const Job<T>& job, std::size_t begin, std::size_t end) {
  for (std::size_t k = begin; k < end; ++k) {
    const Block& block = job.blocks[k];
    const T* g = job.grad + block.begin;
    const std::size_t n = job.active[block.param] ? static_cast<std::size_t>(block.length) : 0;
    double lanes[kLanes] = {};
    std::size_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (std::size_t j = 0; j < kLanes; ++j) lanes[j] += square(g[i + j]);
    for (std::size_t j = 0; i < n; ++i, ++j) lanes[j] += square(g[i]);
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    job.sums[k] = sum;
  }
}

template <Decay decay, typename T>
FASTGAN_INLINE void adam(const Job<T>& job, T* __restrict p, const T* __restrict grad, T* __restrict exp_avg,
                         T* __restrict exp_avg_sq, std::size_t n, T rate, T root) {
  const T beta2 = job.beta2, rest1 = job.rest1, rest2 = job.rest2, eps = job.eps;
  const T weight_decay = job.weight_decay, shrink = job.shrink;
  for (std::size_t i = 0; i < n; ++i) {
    const T old = decay == Decay::kParameter ? p[i] - shrink * p[i] : p[i];
    const T g = decay == Decay::kGradient ? grad[i] + weight_decay * p[i] : grad[i];
    const T m = exp_avg[i] + (g - exp_avg[i]) * rest1;
    const T v = beta2 * exp_avg_sq[i] + rest2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    p[i] = old - rate * m / (std::sqrt(v) * root + eps);
  }
}

template <typename T>
FASTGAN_INLINE void clamp(T* p, std::size_t n, T clip) {  // NaN stays
  for (std::size_t i = 0; i < n; ++i) p[i] = p[i] < -clip ? -clip : (p[i] > clip ? clip : p[i]);
}

template <typename T>
FASTGAN_INLINE void follow(T* __restrict average, const T* __restrict p, std::size_t n, T weight) {  // torch's lerp
  if (weight < T(0.5)) {
    for (std::size_t i = 0; i < n; ++i) average[i] = average[i] + weight * (p[i] - average[i]);
  } else {
    for (std::size_t i = 0; i < n; ++i) average[i] = p[i] - (p[i] - average[i]) * (1 - weight);
  }
}

template <typename T>
FASTGAN_INLINE void round_to_bf16(std::uint16_t* __restrict low, const T* __restrict p, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const float value = static_cast<float>(p[i]);
    std::uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    const std::uint32_t rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16;  // to nearest, ties to even
    low[i] = static_cast<std::uint16_t>((word & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

template <typename T>
FASTGAN_INLINE void update(const Job<T>& job, std::size_t begin, std::size_t end) {
  for (std::size_t k = begin; k < end; ++k) {  // a block stays in the first-level cache for all that is done with it
    const Block& block = job.blocks[k];
    const std::size_t n = static_cast<std::size_t>(block.length);
    T *p = job.flat + block.begin, *grad = job.grad + block.begin;
    if (job.finite && job.active[block.param]) {
      T *m = job.exp_avg + block.begin, *v = job.exp_avg_sq + block.begin;
      const T rate = static_cast<T>(job.rates[block.param]), root = static_cast<T>(job.roots[block.param]);
      switch (job.decay) {
        case Decay::kNone: adam<Decay::kNone>(job, p, grad, m, v, n, rate, root); break;
        case Decay::kGradient: adam<Decay::kGradient>(job, p, grad, m, v, n, rate, root); break;
        case Decay::kParameter: adam<Decay::kParameter>(job, p, grad, m, v, n, rate, root); break;
      }
    }
    if (job.clip >= 0) clamp(p, n, job.clip);
    if (job.average != nullptr) follow(job.average + block.begin, p, n, job.weight);
    if (job.low != nullptr) round_to_bf16(job.low + block.begin, p, n);
    if (job.zero_grad) std::memset(grad, 0, n * sizeof(T));
  }
}

FASTGAN_CLONES void sum_part(const Job<float>& job, std::size_t begin, std::size_t end) {
  sum_squares(job, begin, end);
}
FASTGAN_CLONES void sum_part(const Job<double>& job, std::size_t begin, std::size_t end) {
  sum_squares(job, begin, end);
}
FASTGAN_CLONES void update_part(const Job<float>& job, std::size_t begin, std::size_t end) {
  update(job, begin, end);
}
FASTGAN_CLONES void update_part(const Job<double>& job, std::size_t begin, std::size_t end) {
  update(job, begin, end);
}

double schedule_factor(const AdamPass& pass) {  // fastgan.optim.Schedule.factor
  const double at = static_cast<double>(*pass.update);
  double factor = 1;
  if (pass.schedule != AdamPass::Schedule::kConstant) {
    const double length = pass.schedule_steps - pass.schedule_start;
    const double done = std::clamp((at - pass.schedule_start) / length, 0.0, 1.0);
    const double left = pass.schedule == AdamPass::Schedule::kLinear ? 1 - done : (1 + std::cos(M_PI * done)) / 2;
    factor = pass.schedule_final + (1 - pass.schedule_final) * left;
  }
  return pass.warmup > 0 ? factor * std::min((at + 1) / pass.warmup, 1.0) : factor;
}

double average_weight(const AdamPass& pass) {  // fastgan.ema.EMA.weight
  if (pass.average == nullptr) return 0;
  if (pass.ema_decay >= 0) return 1 - pass.ema_decay;
  double halflife = pass.ema_halflife;
  if (pass.ema_rampup >= 0) halflife = std::min(halflife, static_cast<double>(*pass.images) * pass.ema_rampup);
  return 1 - std::exp2(-static_cast<double>(*pass.images - *pass.averaged) / std::max(halflife, 1e-8));
}

template <typename T>
void run(AdamPass& pass, const std::uint8_t* active, int threads) {
  double* const sums = pass.scratch.data();
  double* const rates = sums + pass.n_blocks;
  double* const roots = rates + pass.n_params;
  const double lr = pass.lr * schedule_factor(pass);
  Job<T> job{pass.blocks,
             active,
             static_cast<T*>(pass.flat),
             static_cast<T*>(pass.grad),
             static_cast<T*>(pass.exp_avg),
             static_cast<T*>(pass.exp_avg_sq),
             static_cast<T*>(pass.average),
             pass.low,
             sums,
             rates,
             roots,
             static_cast<T>(pass.beta2),
             static_cast<T>(1 - pass.beta1),
             static_cast<T>(1 - pass.beta2),
             static_cast<T>(pass.eps),
             static_cast<T>(pass.weight_decay),
             static_cast<T>(lr * pass.weight_decay),
             static_cast<T>(average_weight(pass)),
             static_cast<T>(pass.clip),
             pass.decay,
             true,
             pass.zero_grad};
  const std::int64_t size = pass.n_blocks ? pass.blocks[pass.n_blocks - 1].begin : 0;  // but for the last block
  const int team = size < kWorthATeam ? 1 : threads;

  parallel_for(pass.n_blocks, kSumGrain, team, [&](std::size_t begin, std::size_t end) { sum_part(job, begin, end); });
  double sum = 0;
  for (std::size_t k = 0; k < pass.n_blocks; ++k) sum += sums[k];
  // In the parameters' own type: a square that is not finite there would stay in the second moment for good.
  const T total = static_cast<T>(sum);
  job.finite = std::isfinite(total);
  *static_cast<T*>(pass.grad_norm) = static_cast<T>(std::sqrt(static_cast<double>(total)));
  if (job.finite) {
    for (std::size_t i = 0; i < pass.n_params; ++i) {
      if (!active[i]) continue;
      const double t = pass.steps[i] += 1;
      rates[i] = lr / (1 - std::pow(pass.beta1, t));
      roots[i] = 1 / std::sqrt(1 - std::pow(pass.beta2, t));
    }
  } else {
    *pass.skipped += 1;
  }
  parallel_for(pass.n_blocks, kUpdateGrain, team,
               [&](std::size_t begin, std::size_t end) { update_part(job, begin, end); });
  if (pass.average != nullptr) *pass.averaged = *pass.images;
}

}  // namespace

void AdamPass::run(const std::uint8_t* active, int threads) {
  if (is_double) {
    fastgan::run<double>(*this, active, threads);
  } else {
    fastgan::run<float>(*this, active, threads);
  }
}

}  // namespace fastgan
