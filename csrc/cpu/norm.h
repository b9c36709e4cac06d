// LayerNorm (center) and RMSNorm: the sweeps of fda_fast/ops/norm.py, one pass over memory.
//
//   xc = x - mean(x) (x itself without centering),  rho = 1 / sqrt(mean(xc^2) + eps),  xh = rho xc
//   J(x) h = rho (h - mean(h) - xh mean(h xh)),     the symmetric Jacobian of xh
//
// Row sums are in float64, so that means may be subtracted from products of means.
#pragma once

#include "block.h"
#include "parallel.h"

namespace fda {
namespace FDA_ISA {

// A number in two float32 parts: subtracting both leaves no error of the size of the number.
struct Split {
  float high, low;
  explicit Split(double value)
      : high(static_cast<float>(value)), low(static_cast<float>(value - high)) {}
};

// Statistics of one row of both branches; xh_f = xh + dxh, dxh = rho_f dxc + drho xc.
struct NormRow {
  Split mean{0.0}, dmean{0.0};
  double rho = 0.0, rho_f = 0.0, drho = 0.0;
};

template <bool Center>
static NormRow norm_row(int64_t d, const float* x, const float* dx, double eps) {
  NormRow row;
  double mean = 0.0, dmean = 0.0;
  if (Center) {
    for_blocks(d, [&](int64_t at, int64_t len) {
      const float* __restrict__ xs = x + at;
      const float* __restrict__ dxs = input(dx, at);
      double sum = 0.0, dsum = 0.0;
#pragma omp simd reduction(+ : sum, dsum)
      for (int64_t i = 0; i < len; ++i) {
        sum += xs[i];
        dsum += dxs[i];
      }
      mean += sum;
      dmean += dsum;
    });
    row.mean = Split(mean / d);
    row.dmean = Split(dmean / d);
  }
  double square = 0.0, step = 0.0;
  for_blocks(d, [&](int64_t at, int64_t len) {
    const float* __restrict__ xs = x + at;
    const float* __restrict__ dxs = input(dx, at);
    const float m1 = row.mean.high, m2 = row.mean.low;
    const float d1 = row.dmean.high, d2 = row.dmean.low;
    double sum = 0.0, change = 0.0;
#pragma omp simd reduction(+ : sum, change)
    for (int64_t i = 0; i < len; ++i) {
      const double xc = (xs[i] - m1) - m2;
      const double dxc = (dxs[i] - d1) - d2;
      sum += xc * xc;
      change += dxc * (2.0 * xc + dxc);
    }
    square += sum;
    step += change;
  });
  const double spread = square / d + eps;
  row.rho = 1.0 / __builtin_sqrt(spread);
  row.rho_f = row.rho;
  if (dx) {
    step /= d;
    row.rho_f = 1.0 / __builtin_sqrt(spread + step);
    row.drho = -step * row.rho * row.rho_f / (1.0 / row.rho + 1.0 / row.rho_f);
  }
  return row;
}

// Normalised values of one element.
struct Normalised {
  float xh, dxh;
};

// The per-element part of a row, in float32.
struct NormColumn {
  float m1, m2, d1, d2, rho, rho_f, drho;
  explicit NormColumn(const NormRow& row)
      : m1(row.mean.high),
        m2(row.mean.low),
        d1(row.dmean.high),
        d2(row.dmean.low),
        rho(static_cast<float>(row.rho)),
        rho_f(static_cast<float>(row.rho_f)),
        drho(static_cast<float>(row.drho)) {}
  inline __attribute__((always_inline)) Normalised operator()(float x, float dx) const {
    const float xc = (x - m1) - m2;
    return {rho * xc, rho_f * ((dx - d1) - d2) + drho * xc};
  }
};

static const float* norm_at(const float* p, int64_t offset) { return p ? p + offset : nullptr; }

template <bool Center>
void norm_forward_kind(int64_t K, int64_t R, int64_t d, const float* x, const float* dx,
                       const float* w, const float* c, const float* tw, const float* tb,
                       double eps, float* y, float* dy, int threads) {
  parallel_for(K * R, ceil_div(kGrain * kBlock, d), threads, [=](int64_t r) {
    alignas(64) float scratch[kBlock];
    const int64_t k = r / R;
    const float* row_x = x + r * d;
    const float* row_dx = norm_at(dx, r * d);
    const float* row_tw = norm_at(tw, k * d);
    const float* row_tb = norm_at(tb, k * d);
    const NormColumn column(norm_row<Center>(d, row_x, row_dx, eps));
    for_blocks(d, [&](int64_t at, int64_t len) {
      const float* __restrict__ xs = row_x + at;
      const float* __restrict__ dxs = input(row_dx, at);
      const float* __restrict__ ws = factor(w, at);
      const float* __restrict__ cs = input(c, at);
      const float* __restrict__ tws = input(row_tw, at);
      const float* __restrict__ tbs = input(row_tb, at);
      float* __restrict__ ys = y + r * d + at;
      float* __restrict__ dys = dy ? dy + r * d + at : scratch;
      const NormColumn col = column;
#pragma omp simd
      for (int64_t i = 0; i < len; ++i) {
        const Normalised n = col(xs[i], dxs[i]);
        ys[i] = n.xh * ws[i] + cs[i];
        dys[i] = n.dxh * ws[i] + (n.xh + n.dxh) * tws[i] + tbs[i];
      }
    });
  });
}

// t_y = w J(x) t + xh mw + mb
template <bool Center>
void norm_tangent_kind(int64_t K, int64_t R, int64_t d, const float* x, const float* t,
                       const float* w, const float* mw, const float* mb, double eps, float* out,
                       int threads) {
  parallel_for(K * R, ceil_div(kGrain * kBlock, d), threads, [=](int64_t r) {
    const int64_t k = r / R;
    const float* row_x = x + r * d;
    const float* row_t = norm_at(t, r * d);
    const float* row_mw = norm_at(mw, k * d);
    const float* row_mb = norm_at(mb, k * d);
    const NormColumn column(norm_row<Center>(d, row_x, nullptr, eps));
    double mean = 0.0, along = 0.0;
    for_blocks(d, [&](int64_t at, int64_t len) {
      const float* __restrict__ xs = row_x + at;
      const float* __restrict__ ts = input(row_t, at);
      const NormColumn col = column;
      double sum = 0.0, product = 0.0;
#pragma omp simd reduction(+ : sum, product)
      for (int64_t i = 0; i < len; ++i) {
        sum += ts[i];
        product += static_cast<double>(ts[i]) * col(xs[i], 0.0f).xh;
      }
      mean += sum;
      along += product;
    });
    const Split shift(Center ? mean / d : 0.0);
    const float slope = static_cast<float>(along / d);
    for_blocks(d, [&](int64_t at, int64_t len) {
      const float* __restrict__ xs = row_x + at;
      const float* __restrict__ ts = input(row_t, at);
      const float* __restrict__ ws = factor(w, at);
      const float* __restrict__ mws = input(row_mw, at);
      const float* __restrict__ mbs = input(row_mb, at);
      float* __restrict__ outs = out + r * d + at;
      const NormColumn col = column;
      const float s1 = shift.high, s2 = shift.low;
#pragma omp simd
      for (int64_t i = 0; i < len; ++i) {
        const float xh = col(xs[i], 0.0f).xh;
        outs[i] = col.rho * (((ts[i] - s1) - s2) - xh * slope) * ws[i] + xh * mws[i] + mbs[i];
      }
    });
  });
}

static void norm_forward(int center, int64_t K, int64_t R, int64_t d, const float* x,
                         const float* dx, const float* w, const float* c, const float* tw,
                         const float* tb, double eps, float* y, float* dy, int threads) {
  const auto kernel = center ? norm_forward_kind<true> : norm_forward_kind<false>;
  kernel(K, R, d, x, dx, w, c, tw, tb, eps, y, dy, threads);
}

static void norm_tangent(int center, int64_t K, int64_t R, int64_t d, const float* x,
                         const float* t, const float* w, const float* mw, const float* mb,
                         double eps, float* out, int threads) {
  const auto kernel = center ? norm_tangent_kind<true> : norm_tangent_kind<false>;
  kernel(K, R, d, x, t, w, mw, mb, eps, out, threads);
}

}  // namespace FDA_ISA
}  // namespace fda
