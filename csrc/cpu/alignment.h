// Dots and combinations over the segments of packed rows: fda_fast/ops/alignment.py.
//
// Rows [K, R, o] consist of `segments` parts of widths[s] columns; coefficients are [K, segments].
#pragma once

#include "block.h"
#include "parallel.h"

namespace fda {
namespace FDA_ISA {

// Rows whose dots are summed together: fixed, so that sums do not depend on the threads.
constexpr int64_t kDotRows = 16;

// out [2, K, segments] = <g, u> and <g, v>. `partial` holds 2 * segments float64 for each group of
// kDotRows rows of each task.
static void alignment_dots(int64_t K, int64_t R, int64_t o, int64_t segments,
                           const int64_t* widths, const float* g, const float* u, const float* v,
                           double* partial, float* out, int threads) {
  const int64_t groups = ceil_div(R, kDotRows);
  const int64_t grain = ceil_div(kGrain * kBlock, kDotRows * (o > 0 ? o : 1));
  parallel_for(K * groups, grain, threads, [=](int64_t item) {
    const int64_t k = item / groups, first = (item % groups) * kDotRows;
    const int64_t last = at_most(first + kDotRows, R);
    double* sums = partial + item * 2 * segments;
    for (int64_t s = 0; s < 2 * segments; ++s) sums[s] = 0.0;
    for (int64_t r = k * R + first; r < k * R + last; ++r) {
      int64_t at = r * o;
      for (int64_t s = 0; s < segments; at += widths[s], ++s) {
        const float* __restrict__ gs = g + at;
        const float* __restrict__ us = u + at;
        const float* __restrict__ vs = v + at;
        double gu = 0.0, gv = 0.0;
#pragma omp simd reduction(+ : gu, gv)
        for (int64_t i = 0; i < widths[s]; ++i) {
          gu += static_cast<double>(gs[i]) * us[i];
          gv += static_cast<double>(gs[i]) * vs[i];
        }
        sums[2 * s] += gu;
        sums[2 * s + 1] += gv;
      }
    }
  });
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t s = 0; s < 2 * segments; ++s) {
      double total = 0.0;
      for (int64_t group = 0; group < groups; ++group) {
        total += partial[(k * groups + group) * 2 * segments + s];
      }
      out[(s % 2 * K + k) * segments + s / 2] = static_cast<float>(total);
    }
  }
}

// f(offset, len, task, segment, column) for every segment of every row.
template <typename F>
inline void segment_rows(int64_t K, int64_t R, int64_t o, int64_t segments, const int64_t* widths,
                         int threads, const F& f) {
  parallel_for(K * R, ceil_div(kGrain * kBlock, o > 0 ? o : 1), threads, [&](int64_t r) {
    int64_t column = 0;
    for (int64_t s = 0; s < segments; column += widths[s], ++s) {
      f(r * o + column, widths[s], r / R, s, column);
    }
  });
}

// out = alpha u + beta v + row, row [K, o]
static void alignment_mix(int64_t K, int64_t R, int64_t o, int64_t segments,
                          const int64_t* widths, const float* alpha, const float* u,
                          const float* beta, const float* v, const float* row, float* out,
                          int threads) {
  segment_rows(K, R, o, segments, widths, threads,
               [=](int64_t at, int64_t len, int64_t k, int64_t s, int64_t column) {
                 const float a = alpha[k * segments + s], b = beta[k * segments + s];
                 const float* __restrict__ us = u + at;
                 const float* __restrict__ vs = v + at;
                 float* __restrict__ outs = out + at;
                 if (!row) {
#pragma omp simd
                   for (int64_t i = 0; i < len; ++i) outs[i] = a * us[i] + b * vs[i];
                   return;
                 }
                 const float* __restrict__ rows = row + k * o + column;
#pragma omp simd
                 for (int64_t i = 0; i < len; ++i) outs[i] = a * us[i] + b * vs[i] + rows[i];
               });
}

// Loss [K], cosines [K, P] and coefficients [2, K, P] from dots [2, K, P] and squares [K, P].
static void alignment_coefficients(int64_t K, int64_t P, const float* dots, const float* squares,
                                   const unsigned char* active, double eps, float* loss,
                                   float* cosines, float* coefficients) {
  for (int64_t k = 0; k < K; ++k) {
    double total = 0.0;
    for (int64_t p = 0; p < P; ++p) {
      const int64_t at = k * P + p;
      const double square = dots[K * P + at];
      const double norm_t = __builtin_sqrt(static_cast<double>(squares[at]));
      const double norm_g = __builtin_sqrt(square > 0.0 ? square : square * 0.0);
      const double floored_g = norm_g < eps ? eps : norm_g;
      const double product = floored_g * (norm_t < 1e-8 ? 1e-8 : norm_t);
      const bool used = active[p] && norm_t > 0.0;
      const double cosine = used ? dots[at] / product : 0.0;
      cosines[at] = static_cast<float>(cosine);
      coefficients[at] = used ? static_cast<float>(-1.0 / product) : 0.0f;
      coefficients[K * P + at] =
          used && norm_g > 0.0 ? static_cast<float>(cosine / (floored_g * norm_g)) : 0.0f;
      total += 1.0 - cosine;
    }
    loss[k] = static_cast<float>(total);
  }
}

}  // namespace FDA_ISA
}  // namespace fda
