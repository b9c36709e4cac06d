// Activation phi, elementwise: the sweeps of fda_fast/ops/activation.py.
#pragma once

#include "../math.h"
#include "block.h"
#include "parallel.h"

namespace fda {
namespace FDA_ISA {

template <Kind K>
void activation_forward_kind(int64_t n, const float* x, const float* dx, float* y, float* dy,
                             int threads) {
  parallel_for(ceil_div(n, kBlock), kGrain, threads, [=](int64_t block) {
    const int64_t at = block * kBlock, len = at_most(kBlock, n - at);
    const float* __restrict__ xs = x + at;
    float* __restrict__ ys = y + at;
    if (!dx) {
#pragma omp simd
      for (int64_t i = 0; i < len; ++i) ys[i] = derivatives<K>(xs[i]).phi;
      return;
    }
    const float* __restrict__ dxs = dx + at;
    float* __restrict__ dys = dy + at;
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) {
      const Differences d = differences<K>(xs[i], dxs[i]);
      ys[i] = d.phi;
      dys[i] = d.dphi;
    }
  });
}

template <Kind K>
void activation_slope_kind(int64_t n, const float* x, const float* dx, const float* v, float* out,
                           int threads) {
  parallel_for(ceil_div(n, kBlock), kGrain, threads, [=](int64_t block) {
    const int64_t at = block * kBlock, len = at_most(kBlock, n - at);
    const float* __restrict__ xs = x + at;
    const float* __restrict__ dxs = input(dx, at);
    const float* __restrict__ vs = v + at;
    float* __restrict__ outs = out + at;
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) outs[i] = derivatives<K>(xs[i] + dxs[i]).phi1 * vs[i];
  });
}

template <Kind K>
void activation_reverse_kind(int64_t n, const float* x, const float* dx, const float* g,
                             const float* t, const float* S, const float* b, float* S_x,
                             float* b_x, int threads) {
  parallel_for(ceil_div(n, kBlock), kGrain, threads, [=](int64_t block) {
    alignas(64) float scratch[kBlock];
    const int64_t at = block * kBlock, len = at_most(kBlock, n - at);
    const float* __restrict__ xs = x + at;
    const float* __restrict__ dxs = input(dx, at);
    const float* __restrict__ gs = input(g, at);
    const float* __restrict__ ts = input(t, at);
    const float* __restrict__ Ss = S + at;
    const float* __restrict__ bs = input(b, at);
    float* __restrict__ S_xs = S_x + at;
    float* __restrict__ b_xs = output(b_x, at, scratch);
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) {
      const Differences d = differences<K>(xs[i], dxs[i]);
      S_xs[i] = d.phi1 * Ss[i] + d.dphi1 * bs[i] + d.phi2 * gs[i] * ts[i];
      b_xs[i] = d.phi1_f * bs[i];
    }
  });
}

static void activation_forward(int kind, int64_t n, const float* x, const float* dx, float* y,
                               float* dy, int threads) {
  FDA_BY_KIND(kind, activation_forward_kind, n, x, dx, y, dy, threads)
}

static void activation_slope(int kind, int64_t n, const float* x, const float* dx, const float* v,
                             float* out, int threads) {
  FDA_BY_KIND(kind, activation_slope_kind, n, x, dx, v, out, threads)
}

static void activation_reverse(int kind, int64_t n, const float* x, const float* dx,
                               const float* g, const float* t, const float* S, const float* b,
                               float* S_x, float* b_x, int threads) {
  FDA_BY_KIND(kind, activation_reverse_kind, n, x, dx, g, t, S, b, S_x, b_x, threads)
}

}  // namespace FDA_ISA
}  // namespace fda
