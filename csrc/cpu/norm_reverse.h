// The reverse sweep of LayerNorm and RMSNorm; see norm.h for the notation.
//
//   S_x = J(x) h + (J(x + dx) - J(x)) (w b) + J(x + dx) (tw b) + d/dx <w g, J(x) t>
//   b_x = J(x + dx) ((w + tw) b),   h = w S + mw g
//
// With xh_f = xh + dxh every term is linear in h, w b, tw b, w g, t, xh, dxh and 1; one pass over
// the row gathers the means that the coefficients are made of, a second one combines.
#pragma once

#include "norm.h"

namespace fda {
namespace FDA_ISA {

struct NormInputs {
  const float *x, *dx, *g, *t, *S, *b;  // [K, R, d]
  const float* w;                       // [d]
  const float *tw, *mw;                 // [K, d]
};

// Sums over one row; c = w b, e = tw b, q = w g.
struct NormSums {
  double h = 0.0, c = 0.0, e = 0.0, q = 0.0, t = 0.0;
  double h_xh = 0.0, c_xh = 0.0, c_dxh = 0.0, e_xh_f = 0.0, q_xh = 0.0, t_xh = 0.0, q_t = 0.0;
};

// Pointers to one block of one row, stand-ins for what is absent.
struct NormBlock {
  const float *x, *dx, *g, *t, *S, *b, *w, *tw, *mw;
  NormBlock(const NormInputs& in, int64_t row, int64_t parameter, int64_t at)
      : x(in.x + row + at),
        dx(input(in.dx, row + at)),
        g(input(in.g, row + at)),
        t(input(in.t, row + at)),
        S(in.S + row + at),
        b(in.b + row + at),
        w(factor(in.w, at)),
        tw(input(in.tw, parameter + at)),
        mw(input(in.mw, parameter + at)) {}
};

static NormSums norm_sums(int64_t d, const NormInputs& in, int64_t row, int64_t parameter,
                          const NormColumn& column) {
  NormSums sums;
  for_blocks(d, [&](int64_t at, int64_t len) {
    const NormBlock v(in, row, parameter, at);
    const NormColumn col = column;
    double h_ = 0.0, c_ = 0.0, e_ = 0.0, q_ = 0.0, t_ = 0.0;
    double h_xh = 0.0, c_xh = 0.0, c_dxh = 0.0, e_xh_f = 0.0, q_xh = 0.0, t_xh = 0.0, q_t = 0.0;
#pragma omp simd reduction(+ : h_, c_, e_, q_, t_, h_xh, c_xh, c_dxh, e_xh_f, q_xh, t_xh, q_t)
    for (int64_t i = 0; i < len; ++i) {
      const Normalised n = col(v.x[i], v.dx[i]);
      const double xh = n.xh, dxh = n.dxh;
      const double h = v.S[i] * v.w[i] + v.g[i] * v.mw[i];
      const double c = v.b[i] * v.w[i], e = v.b[i] * v.tw[i], q = v.g[i] * v.w[i], t = v.t[i];
      h_ += h;
      c_ += c;
      e_ += e;
      q_ += q;
      t_ += t;
      h_xh += h * xh;
      c_xh += c * xh;
      c_dxh += c * dxh;
      e_xh_f += e * (xh + dxh);
      q_xh += q * xh;
      t_xh += t * xh;
      q_t += q * t;
    }
    sums.h += h_;
    sums.c += c_;
    sums.e += e_;
    sums.q += q_;
    sums.t += t_;
    sums.h_xh += h_xh;
    sums.c_xh += c_xh;
    sums.c_dxh += c_dxh;
    sums.e_xh_f += e_xh_f;
    sums.q_xh += q_xh;
    sums.t_xh += t_xh;
    sums.q_t += q_t;
  });
  return sums;
}

// Coefficients of S_x and b_x in the row's vectors.
struct NormCoefficients {
  float h, c, e, q, t, xh, dxh;
  Split one;
  float b_xh_f;
  Split b_one;
};

template <bool Center>
static NormCoefficients norm_coefficients(int64_t d, const NormSums& sums, const NormRow& row) {
  const double inverse = 1.0 / d, center = Center ? inverse : 0.0;
  const double rho2 = row.rho * row.rho;
  const double m_c = sums.c_xh * inverse, m_dc = sums.c_dxh * inverse;
  const double m_e = sums.e_xh_f * inverse;
  const double m_q = sums.q_xh * inverse, m_t = sums.t_xh * inverse;
  const double overlap = sums.q_t * inverse - (sums.q * center) * (sums.t * center) - m_q * m_t;
  const double xh = -(row.rho * sums.h_xh * inverse + row.drho * m_c + row.rho_f * (m_dc + m_e) +
                      rho2 * (overlap - 2.0 * m_q * m_t));
  const double one = -center * (row.rho * sums.h + row.drho * sums.c + row.rho_f * sums.e -
                                rho2 * (m_t * sums.q + m_q * sums.t));
  return {static_cast<float>(row.rho),
          static_cast<float>(row.drho),
          static_cast<float>(row.rho_f),
          static_cast<float>(-rho2 * m_t),
          static_cast<float>(-rho2 * m_q),
          static_cast<float>(xh),
          static_cast<float>(-row.rho_f * (m_c + m_dc + m_e)),
          Split(one),
          static_cast<float>(-row.rho_f * (m_c + m_dc + m_e)),
          Split(-center * row.rho_f * (sums.c + sums.e))};
}

template <bool Center>
void norm_reverse_kind(int64_t K, int64_t R, int64_t d, const NormInputs& in, double eps,
                       float* S_x, float* b_x, int threads) {
  parallel_for(K * R, ceil_div(kGrain * kBlock, 2 * d), threads, [=](int64_t r) {
    const int64_t base = r * d, parameter = r / R * d;
    const NormRow row = norm_row<Center>(d, in.x + base, norm_at(in.dx, base), eps);
    const NormColumn column(row);
    const NormCoefficients coefficients =
        norm_coefficients<Center>(d, norm_sums(d, in, base, parameter, column), row);
    for_blocks(d, [&](int64_t at, int64_t len) {
      alignas(64) float scratch[kBlock];
      const NormBlock v(in, base, parameter, at);
      const NormColumn col = column;
      const NormCoefficients k = coefficients;
      float* __restrict__ S_xs = S_x + base + at;
      float* __restrict__ b_xs = b_x ? b_x + base + at : scratch;
#pragma omp simd
      for (int64_t i = 0; i < len; ++i) {
        const Normalised n = col(v.x[i], v.dx[i]);
        const float h = v.S[i] * v.w[i] + v.g[i] * v.mw[i];
        const float c = v.b[i] * v.w[i], e = v.b[i] * v.tw[i], q = v.g[i] * v.w[i];
        S_xs[i] = ((k.h * h + k.one.high) + k.one.low) + k.c * c + k.e * e + k.q * q +
                  k.t * v.t[i] + k.xh * n.xh + k.dxh * n.dxh;
        b_xs[i] = ((k.e * (c + e) + k.b_one.high) + k.b_one.low) + k.b_xh_f * (n.xh + n.dxh);
      }
    });
  });
}

static void norm_reverse(int center, int64_t K, int64_t R, int64_t d, const float* x,
                         const float* dx, const float* g, const float* t, const float* S,
                         const float* b, const float* w, const float* tw, const float* mw,
                         double eps, float* S_x, float* b_x, int threads) {
  const auto kernel = center ? norm_reverse_kind<true> : norm_reverse_kind<false>;
  kernel(K, R, d, {x, dx, g, t, S, b, w, tw, mw}, eps, S_x, b_x, threads);
}

}  // namespace FDA_ISA
}  // namespace fda
