// Feature similarity of y and y + dy: fda_fast/ops/similarity.py. Sums in float64.
//
//   n1 = |y|, n2 = |y + dy|, h = y / n1, h_f = (y + dy) / n2, r = (dy - (h.dy) h) / n2
#pragma once

#include "block.h"
#include "parallel.h"

namespace fda {
namespace FDA_ISA {

enum class Distance : int { cosine = 0, l2 = 1, l1 = 2 };

struct SimilarityRow {
  double yy = 0.0, ydy = 0.0, dydy = 0.0;  // <y, y>, <y, dy>, <dy, dy>
  double n1 = 0.0, n2 = 0.0;               // norms, floored as F.cosine_similarity's
  double along = 0.0;                      // h.dy
  double cosine = 0.0;                     // h.h_f
};

static SimilarityRow similarity_row(int64_t d, const float* y, const float* dy) {
  double yy = 0.0, ydy = 0.0, dydy = 0.0;
#pragma omp simd reduction(+ : yy, ydy, dydy)
  for (int64_t i = 0; i < d; ++i) {
    const double a = y[i], b = dy[i];
    yy += a * a;
    ydy += a * b;
    dydy += b * b;
  }
  const auto floored = [](double square) {
    const double norm = __builtin_sqrt(square > 0.0 ? square : 0.0);
    return norm > 1e-8 ? norm : 1e-8;
  };
  SimilarityRow row;
  row.yy = yy;
  row.ydy = ydy;
  row.dydy = dydy;
  row.n1 = floored(yy);
  row.n2 = floored(yy + 2.0 * ydy + dydy);
  row.along = ydy / row.n1;
  row.cosine = (yy + ydy) / (row.n1 * row.n2);
  return row;
}

// out = a y + b dy + c t, coefficients rounded once
static void similarity_combine(int64_t d, double a, const float* __restrict__ y, double b,
                               const float* __restrict__ dy, double c,
                               const float* __restrict__ t, float* __restrict__ out) {
  const float fa = static_cast<float>(a), fb = static_cast<float>(b), fc = static_cast<float>(c);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) out[i] = fc * t[i] + (fb * dy[i] + fa * y[i]);
}

// scale * s of each anchor in `each` [K, A] (added up in order into s [K]), and g.
static void similarity_forward(int kind, int64_t K, int64_t A, int64_t d, const float* y,
                               const float* dy, double scale, double* each, float* s, float* g,
                               int threads) {
  const Distance distance = static_cast<Distance>(kind);
  const double weight = scale / (distance == Distance::cosine ? A : A * d);
  parallel_for(K * A, ceil_div(kGrain * kBlock, d), threads, [=](int64_t r) {
    const float* __restrict__ ys = y + r * d;
    const float* __restrict__ dys = dy + r * d;
    float* __restrict__ gs = g + r * d;
    if (distance == Distance::cosine) {
      const SimilarityRow row = similarity_row(d, ys, dys);
      each[r] = weight * row.cosine;
      const double slope = weight / (row.n1 * row.n2);
      const float a = static_cast<float>(-slope * row.along / row.n1);
      const float b = static_cast<float>(slope);
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) gs[i] = b * dys[i] + a * ys[i];
      return;
    }
    double sum = 0.0;
    const float w = static_cast<float>(weight);
    if (distance == Distance::l2) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < d; ++i) {
        sum += static_cast<double>(dys[i]) * dys[i];
        gs[i] = 2.0f * w * dys[i];
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < d; ++i) {
        sum += dys[i] < 0.0f ? -dys[i] : dys[i];
        gs[i] = dys[i] > 0.0f ? w : dys[i] < 0.0f ? -w : 0.0f * dys[i];
      }
    }
    each[r] = -weight * sum;
  });
  for (int64_t k = 0; k < K; ++k) {
    double sum = 0.0;
    for (int64_t a = 0; a < A; ++a) sum += each[k * A + a];
    s[k] = static_cast<float>(sum);
  }
}

// S and b of the cosine; both are combinations of y, dy and t.
static void similarity_reverse(int64_t K, int64_t A, int64_t d, const float* y, const float* dy,
                               const float* t, double scale, float* S, float* b, int threads) {
  parallel_for(K * A, ceil_div(kGrain * kBlock, d), threads, [=](int64_t r) {
    const float* __restrict__ ys = y + r * d;
    const float* __restrict__ dys = dy + r * d;
    const float* __restrict__ ts = t + r * d;
    const SimilarityRow row = similarity_row(d, ys, dys);
    double ty = 0.0, tdy = 0.0;
#pragma omp simd reduction(+ : ty, tdy)
    for (int64_t i = 0; i < d; ++i) {
      ty += static_cast<double>(ts[i]) * ys[i];
      tdy += static_cast<double>(ts[i]) * dys[i];
    }
    const double n1 = row.n1, n2 = row.n2;
    const double q = scale / (A * n1);  // the cotangent at the residual is q t
    const double q_h = q * ty / n1;
    const double q_r = (q * tdy - row.along * q_h) / n2;
    // P q = q t - (q.h) h; its product with h_f
    const double Pq_h_f = (q * (ty + tdy) - q_h * (row.yy + row.ydy) / n1) / n2;
    const double share = row.along / (n1 * n2);
    similarity_combine(d, share * q_h / n1 - q_r * (1.0 / (n2 * n2) + 1.0 / (n1 * n1)) +
                              q_h * share / n1,
                       ys, -q_r / (n2 * n2) - q_h / (n1 * n2), dys, -share * q, ts, S + r * d);
    similarity_combine(d, -q_h / (n1 * n2) - Pq_h_f / (n2 * n2), ys, -Pq_h_f / (n2 * n2), dys,
                       q / n2, ts, b + r * d);
  });
}

}  // namespace FDA_ISA
}  // namespace fda
