// Adam in one pass: fda_fast/ops/adamw.py and fda_fast/ops/coefficients.py.
#pragma once

#include "../adam.h"
#include "block.h"
#include "parallel.h"

namespace fda {
namespace FDA_ISA {

static void adamw_step(int64_t K, int64_t n, float* anchors, const float* grad, float* exp_avg,
                       float* exp_avg_sq, const float* loss, float* best_loss, float* best,
                       float beta2, float gain1, float gain2, float step_size, float root,
                       float eps, float decay, int threads) {
  const Adam a{beta2, gain1, gain2, step_size, root, eps};
  const int64_t per_task = ceil_div(n, kBlock);
  parallel_for(K * per_task, kGrain, threads, [=](int64_t item) {
    const int64_t k = item / per_task, column = (item % per_task) * kBlock;
    const int64_t at = k * n + column, len = at_most(kBlock, n - column);
    float* __restrict__ xs = anchors + at;
    const float* __restrict__ gs = grad + at;
    float* __restrict__ ms = exp_avg + at;
    float* __restrict__ vs = exp_avg_sq + at;
    if (loss[k] < best_loss[k]) __builtin_memcpy(best + at, xs, len * sizeof(float));
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) xs[i] = adam(a, decay * xs[i], gs[i], ms[i], vs[i]);
  });
  for (int64_t k = 0; k < K; ++k) {
    if (loss[k] < best_loss[k]) best_loss[k] = loss[k];
  }
}

static void coefficients_update(int64_t K, int64_t n, float* alpha, const float* tau,
                                const float* grad, float* exp_avg, float* exp_avg_sq,
                                float* delta, float beta2, float gain1, float gain2,
                                float step_size, float root, float eps, int threads) {
  const Adam a{beta2, gain1, gain2, step_size, root, eps};
  parallel_for(ceil_div(n, kBlock), ceil_div(kGrain, K > 0 ? K : 1), threads, [=](int64_t block) {
    alignas(64) float sum[kBlock], deviation[kBlock];
    const int64_t at = block * kBlock, len = at_most(kBlock, n - at);
    const float* __restrict__ gs = grad + at;
    float* __restrict__ ms = exp_avg + at;
    float* __restrict__ vs = exp_avg_sq + at;
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) {
      moments(a, gs[i], ms[i], vs[i]);
      deviation[i] = square_root(vs[i]) / a.root;
      sum[i] = 0.0f;
    }
    for (int64_t k = 0; k < K; ++k) {
      float* __restrict__ as = alpha + k * n + at;
      const float* __restrict__ taus = tau + k * n + at;
#pragma omp simd
      for (int64_t i = 0; i < len; ++i) {
        as[i] = scaled_adam(a, as[i], taus[i], ms[i], deviation[i]);
        sum[i] += as[i] * taus[i];
      }
    }
    __builtin_memcpy(delta + at, sum, len * sizeof(float));
  });
}

}  // namespace FDA_ISA
}  // namespace fda
