// Gated activation y = phi(gate) up over packed rows [gate | up]: fda_fast/ops/gated.py.
#pragma once

#include "../math.h"
#include "block.h"
#include "parallel.h"

namespace fda {
namespace FDA_ISA {

// f(packed, single, len) for every block of columns of every row: offsets of the block's gate in
// a packed tensor [rows, 2 h] (its up is h further) and in a tensor [rows, h].
template <typename F>
inline void gated_blocks(int64_t rows, int64_t h, int threads, const F& f) {
  const int64_t per_row = ceil_div(h, kBlock);
  const int64_t grain = kGrain * kBlock / at_most(kBlock, h > 0 ? h : 1);
  parallel_for(rows * per_row, grain, threads, [&](int64_t item) {
    const int64_t row = item / per_row, column = (item % per_row) * kBlock;
    f(row * 2 * h + column, row * h + column, at_most(kBlock, h - column));
  });
}

template <Kind K>
void gated_forward_kind(int64_t rows, int64_t h, const float* x, const float* dx, float* y,
                        float* dy, int threads) {
  gated_blocks(rows, h, threads, [=](int64_t packed, int64_t single, int64_t len) {
    const float* __restrict__ gate = x + packed;
    const float* __restrict__ up = x + packed + h;
    float* __restrict__ ys = y + single;
    if (!dx) {
#pragma omp simd
      for (int64_t i = 0; i < len; ++i) ys[i] = derivatives<K>(gate[i]).phi * up[i];
      return;
    }
    const float* __restrict__ dgate = dx + packed;
    const float* __restrict__ dup = dx + packed + h;
    float* __restrict__ dys = dy + single;
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) {
      const Differences d = differences<K>(gate[i], dgate[i]);
      ys[i] = d.phi * up[i];
      dys[i] = d.dphi * (up[i] + dup[i]) + d.phi * dup[i];
    }
  });
}

template <Kind K>
void gated_backward_kind(int64_t rows, int64_t h, const float* x, const float* dx, const float* g,
                         float* out, int threads) {
  gated_blocks(rows, h, threads, [=](int64_t packed, int64_t single, int64_t len) {
    const float* __restrict__ gate = x + packed;
    const float* __restrict__ up = x + packed + h;
    const float* __restrict__ dgate = input(dx, packed);
    const float* __restrict__ dup = input(dx, packed + h);
    const float* __restrict__ gs = g + single;
    float* __restrict__ out_gate = out + packed;
    float* __restrict__ out_up = out + packed + h;
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) {
      const Derivatives d = derivatives<K>(gate[i] + dgate[i]);
      out_gate[i] = d.phi1 * (up[i] + dup[i]) * gs[i];
      out_up[i] = d.phi * gs[i];
    }
  });
}

template <Kind K>
void gated_tangent_kind(int64_t rows, int64_t h, const float* x, const float* t, float* out,
                        int threads) {
  gated_blocks(rows, h, threads, [=](int64_t packed, int64_t single, int64_t len) {
    const float* __restrict__ gate = x + packed;
    const float* __restrict__ up = x + packed + h;
    const float* __restrict__ t_gate = t + packed;
    const float* __restrict__ t_up = t + packed + h;
    float* __restrict__ outs = out + single;
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) {
      const Derivatives d = derivatives<K>(gate[i]);
      outs[i] = d.phi1 * up[i] * t_gate[i] + d.phi * t_up[i];
    }
  });
}

template <Kind K>
void gated_reverse_kind(int64_t rows, int64_t h, const float* x, const float* dx, const float* g,
                        const float* t, const float* S, const float* b, float* S_x, float* b_x,
                        int threads) {
  gated_blocks(rows, h, threads, [=](int64_t packed, int64_t single, int64_t len) {
    alignas(64) float scratch[2 * kBlock];
    const float* __restrict__ gate = x + packed;
    const float* __restrict__ up = x + packed + h;
    const float* __restrict__ dgate = input(dx, packed);
    const float* __restrict__ dup = input(dx, packed + h);
    const float* __restrict__ gs = input(g, single);
    const float* __restrict__ t_gate = input(t, packed);
    const float* __restrict__ t_up = input(t, packed + h);
    const float* __restrict__ Ss = S + single;
    const float* __restrict__ bs = input(b, single);
    float* __restrict__ S_gate = S_x + packed;
    float* __restrict__ S_up = S_x + packed + h;
    float* __restrict__ b_gate = output(b_x, packed, scratch);
    float* __restrict__ b_up = output(b_x, packed + h, scratch + kBlock);
#pragma omp simd
    for (int64_t i = 0; i < len; ++i) {
      const Differences d = differences<K>(gate[i], dgate[i]);
      const float up_f = up[i] + dup[i];
      S_gate[i] = d.phi1 * up[i] * Ss[i] + (d.dphi1 * up_f + d.phi1 * dup[i]) * bs[i] +
                  gs[i] * (d.phi2 * up[i] * t_gate[i] + d.phi1 * t_up[i]);
      S_up[i] = d.phi * Ss[i] + d.dphi * bs[i] + d.phi1 * gs[i] * t_gate[i];
      b_gate[i] = d.phi1_f * up_f * bs[i];
      b_up[i] = d.phi_f * bs[i];
    }
  });
}

static void gated_forward(int kind, int64_t rows, int64_t h, const float* x, const float* dx,
                          float* y, float* dy, int threads) {
  FDA_BY_KIND(kind, gated_forward_kind, rows, h, x, dx, y, dy, threads)
}

static void gated_backward(int kind, int64_t rows, int64_t h, const float* x, const float* dx,
                           const float* g, float* out, int threads) {
  FDA_BY_KIND(kind, gated_backward_kind, rows, h, x, dx, g, out, threads)
}

static void gated_tangent(int kind, int64_t rows, int64_t h, const float* x, const float* t,
                          float* out, int threads) {
  FDA_BY_KIND(kind, gated_tangent_kind, rows, h, x, t, out, threads)
}

static void gated_reverse(int kind, int64_t rows, int64_t h, const float* x, const float* dx,
                          const float* g, const float* t, const float* S, const float* b,
                          float* S_x, float* b_x, int threads) {
  FDA_BY_KIND(kind, gated_reverse_kind, rows, h, x, dx, g, t, S, b, S_x, b_x, threads)
}

}  // namespace FDA_ISA
}  // namespace fda
