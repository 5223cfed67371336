#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastgan {

// One update of one network by Adam or AdamW, in fp32 or fp64: what fastgan.adam describes. All pointers are
// to CPU memory that outlives this; flat tensors are laid out alike. What changes from step to step is read through
// them at every run.
struct AdamPass {
  enum class Decay { kNone, kGradient, kParameter };  // where weight_decay enters
  enum class Schedule { kConstant, kLinear, kCosine };

  struct Block {  // a part of one parameter
    std::int64_t begin, length, param;
  };

  bool is_double;
  void *flat, *grad, *exp_avg, *exp_avg_sq;
  void* average;  // may be null
  std::uint16_t* low;  // bf16, may be null
  const Block* blocks;  // [n_blocks], in order
  std::size_t n_blocks, n_params;
  float* steps;  // [n_params]
  const std::int64_t* update;
  std::int64_t* skipped;
  void* grad_norm;  // one number of the flat tensors' type
  double lr, beta1, beta2, eps, weight_decay;
  Decay decay;
  Schedule schedule;
  double schedule_start, schedule_steps, schedule_final, warmup;
  const std::int64_t* images;  // this and `averaged` may be null together with `average`
  std::int64_t* averaged;
  double ema_decay, ema_halflife, ema_rampup;  // ema_decay < 0: by half-life; ema_rampup < 0: none
  double clip;  // < 0: none
  bool zero_grad;
  std::vector<double> scratch = {};  // one per block and two per parameter

  // active[i]: parameter i has a gradient. Not to be run by two threads at once.
  void run(const std::uint8_t* active, int threads);
};

}  // namespace fastgan
