// Backward and adjoint sweeps of LayerNorm and RMSNorm; see norm.h for the notation.
//
//   g_x = J(x + dx) ((w + tw) g),   G_w = sum over rows of g xh_f,   G_c = sum over rows of g
#pragma once

#include "norm.h"

namespace fda {
namespace FDA_ISA {

// Rows whose parameter gradients are summed together: fixed, so that results do not depend on the
// number of threads.
constexpr int64_t kNormRows = 32;

// Sums of c = (w + tw) g and of c xh_f over one row; g xh_f and g are added to `sums` [2, d].
static void norm_backward_sums(int64_t d, const float* x, const float* dx, const float* g,
                               const float* w, const float* tw, const NormColumn& column,
                               float* sums, double& mean, double& along) {
  for_blocks(d, [&](int64_t at, int64_t len) {
    alignas(64) float scratch[2 * kBlock] = {};
    const float* __restrict__ xs = x + at;
    const float* __restrict__ dxs = input(dx, at);
    const float* __restrict__ gs = g + at;
    const float* __restrict__ ws = factor(w, at);
    const float* __restrict__ tws = input(tw, at);
    float* __restrict__ sum_w = sums ? sums + at : scratch;
    float* __restrict__ sum_c = sums ? sums + d + at : scratch + kBlock;
    const NormColumn col = column;
    double c_ = 0.0, c_xh = 0.0;
#pragma omp simd reduction(+ : c_, c_xh)
    for (int64_t i = 0; i < len; ++i) {
      const Normalised n = col(xs[i], dxs[i]);
      const float xh_f = n.xh + n.dxh;
      const double c = static_cast<double>(gs[i] * (ws[i] + tws[i]));
      c_ += c;
      c_xh += c * xh_f;
      sum_w[i] += gs[i] * xh_f;
      sum_c[i] += gs[i];
    }
    mean += c_;
    along += c_xh;
  });
}

// rho_f (c - shift - xh_f slope)
static void norm_backward_row(int64_t d, const float* x, const float* dx, const float* g,
                              const float* w, const float* tw, const NormColumn& column,
                              Split shift, float slope, float* out) {
  for_blocks(d, [&](int64_t at, int64_t len) {
    const float* __restrict__ xs = x + at;
    const float* __restrict__ dxs = input(dx, at);
    const float* __restrict__ gs = g + at;
    const float* __restrict__ ws = factor(w, at);
    const float* __restrict__ tws = input(tw, at);
    float* __restrict__ outs = out + at;
    const NormColumn col = column;
    const float s1 = shift.high, s2 = shift.low;
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) {
      const Normalised n = col(xs[i], dxs[i]);
      const float c = gs[i] * (ws[i] + tws[i]);
      outs[i] = col.rho_f * (((c - s1) - s2) - (n.xh + n.dxh) * slope);
    }
  });
}

// The partial sums of each task added up in order.
static void norm_backward_totals(int64_t K, int64_t groups, int64_t d, const float* partial,
                                 float* G_w, float* G_c, int threads) {
  const int64_t blocks = ceil_div(d, kBlock);
  parallel_for(K * blocks, 1, threads, [=](int64_t item) {
    const int64_t k = item / blocks, at = (item % blocks) * kBlock;
    const int64_t len = at_most(kBlock, d - at);
    for (int64_t which = 0; which < 2; ++which) {
      float* out = which ? G_c : G_w;
      if (!out) continue;
      alignas(64) double total[kBlock] = {};
      for (int64_t group = 0; group < groups; ++group) {
        const float* __restrict__ sums = partial + ((k * groups + group) * 2 + which) * d + at;
#pragma omp simd
        for (int64_t i = 0; i < len; ++i) total[i] += sums[i];
      }
      for (int64_t i = 0; i < len; ++i) out[k * d + at + i] = static_cast<float>(total[i]);
    }
  });
}

// `partial` holds 2 d float32 for each group of kNormRows rows of each task, or is null if neither
// G_w nor G_c is wanted.
template <bool Center>
void norm_backward_kind(int64_t K, int64_t R, int64_t d, const float* x, const float* dx,
                        const float* g, const float* w, const float* tw, double eps, float* g_x,
                        float* G_w, float* G_c, float* partial, int threads) {
  const int64_t groups = ceil_div(R, kNormRows);
  const int64_t grain = ceil_div(kGrain * kBlock, kNormRows * d);
  parallel_for(K * groups, grain, threads, [=](int64_t item) {
    const int64_t k = item / groups, first = (item % groups) * kNormRows;
    const int64_t last = at_most(first + kNormRows, R);
    float* sums = partial ? partial + item * 2 * d : nullptr;
    if (sums) __builtin_memset(sums, 0, 2 * d * sizeof(float));
    const float* row_tw = norm_at(tw, k * d);
    for (int64_t r = (k * R + first) * d; r < (k * R + last) * d; r += d) {
      const float* row_dx = norm_at(dx, r);
      const NormColumn column(norm_row<Center>(d, x + r, row_dx, eps));
      double mean = 0.0, along = 0.0;
      norm_backward_sums(d, x + r, row_dx, g + r, w, row_tw, column, sums, mean, along);
      if (!g_x) continue;
      norm_backward_row(d, x + r, row_dx, g + r, w, row_tw, column,
                        Split(Center ? mean / d : 0.0), static_cast<float>(along / d), g_x + r);
    }
  });
  if (partial) norm_backward_totals(K, groups, d, partial, G_w, G_c, threads);
}

static void norm_backward(int center, int64_t K, int64_t R, int64_t d, const float* x,
                          const float* dx, const float* g, const float* w, const float* tw,
                          double eps, float* g_x, float* G_w, float* G_c, float* partial,
                          int threads) {
  const auto kernel = center ? norm_backward_kind<true> : norm_backward_kind<false>;
  kernel(K, R, d, x, dx, g, w, tw, eps, g_x, G_w, G_c, partial, threads);
}

}  // namespace FDA_ISA
}  // namespace fda
