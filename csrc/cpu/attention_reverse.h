// The reverse sweep and the adjoint of attention; see attention_sweeps.h.
#pragma once

#include "attention_sweeps.h"

namespace fda {
namespace FDA_ISA {

// values += difference, if there is one; rows of both are alike
static void add_rows(int64_t count, const float* difference, float* values) {
  if (!difference) return;
  for (int64_t i = 0; i < count; ++i) values[i] += difference[i];
}

// The fine-tuned branch of one head: P_f and its cotangent A_f off the mean, from b.
struct FinetunedScores {
  float *p, *a;
};

static FinetunedScores finetuned_scores(const AttentionHead& head, const float* P, const float* dP,
                                        const float* b, const Keys& v, const Keys& dv,
                                        Arena& arena) {
  const AttentionLayout& l = head.l;
  const int64_t tp = l.tp(), n_scores = l.Q() * tp, at = head.scores();
  FinetunedScores out{arena.take(n_scores), arena.take(n_scores)};
  for (int64_t i = 0; i < n_scores; ++i) out.p[i] = dP ? P[at + i] + dP[at + i] : P[at + i];
  scores_of(l, b, transposed(l, v.rows, arena), out.a, false);
  if (dv.rows) scores_of(l, b, transposed(l, dv.rows, arena), out.a, true);
  for (int64_t r = 0; r < l.Q(); ++r) off_mean(l.T, out.p + r * tp, out.a + r * tp);
  return out;
}

static void finetuned_cotangent(const AttentionHead& head, const float* R, const float* P_f,
                                const float* b, const float* k_f, const float* q_f, Arena& arena,
                                float* b_x) {
  HeadCotangents out(head.l, arena);
  out.scores(head.l, R, k_f, q_f, false);
  mix_back(head.l, P_f, b, out.v, false);
  out.write(head, b_x);
}

// W, times scale: the cotangent of the scores in S_x. On entry W holds S v^T + b dv^T + g tv^T.
static void score_cotangent(int64_t T, float scale, const float* __restrict__ p,
                            const float* __restrict__ dp, const float* __restrict__ a,
                            const float* __restrict__ ts, const float* __restrict__ a_f,
                            float* __restrict__ w) {
#pragma omp simd
  for (int64_t i = 0; i < T; ++i) w[i] += ts[i] * a[i];
  const double mean = mean_under(T, p, w) + (dp ? mean_under(T, dp, a_f) : 0.0);
#pragma omp simd
  for (int64_t i = 0; i < T; ++i) w[i] = p[i] * static_cast<float>(w[i] - mean);
  if (dp) {
#pragma omp simd
    for (int64_t i = 0; i < T; ++i) w[i] += dp[i] * a_f[i];
  }
  for (int64_t i = 0; i < T; ++i) w[i] *= scale;
}

static void attention_reverse(const int64_t* sizes, float scale, const float* cos,
                              const float* sin, const float* x, const float* dx, const float* g,
                              const float* t, const float* S, const float* b, const float* P,
                              const float* dP, const float* A, const float* tS, float* S_x,
                              float* b_x, float* scratch, int threads) {
  const AttentionLayout l(sizes, scale, cos, sin);
  each_head(l, scratch, attention_scratch(sizes), threads, [=](AttentionHead head, Arena arena) {
    const int64_t tp = l.tp(), n_scores = l.Q() * tp, at = head.scores();
    const int64_t key = head.key_column(), value = head.value_column();
    const Keys none{nullptr, nullptr};
    const float* gs = read_queries(head, g, false, arena);
    const float* Ss = read_queries(head, S, false, arena);
    const float* bs = read_queries(head, b, false, arena);
    const Keys v = read_keys(head, x, value, false, arena);
    const Keys dv = dx ? read_keys(head, dx, value, false, arena) : none;
    const Keys tv = read_keys(head, t, value, false, arena);
    const FinetunedScores f = finetuned_scores(head, P, dP, bs, v, dv, arena);

    Arena rest = arena;
    float* W = rest.take(n_scores);
    scores_of(l, Ss, transposed(l, v.rows, rest), W, false);
    if (dx) scores_of(l, bs, transposed(l, dv.rows, rest), W, true);
    scores_of(l, gs, transposed(l, tv.rows, rest), W, true);
    for (int64_t r = 0; r < n_scores; r += tp) {
      score_cotangent(l.T, scale, P + at + r, dP ? dP + at + r : nullptr, A + at + r, tS + at + r,
                      f.a + r, W + r);
    }
    float* R = f.a;  // the cotangent of the fine-tuned scores, in place of A_f
    for (int64_t i = 0; i < n_scores; ++i) R[i] *= f.p[i] * scale;

    float* q = read_queries(head, x, true, rest);
    const Keys k = read_keys(head, x, key, true, rest);
    HeadCotangents out(l, rest);
    out.scores(l, W, k.rows, q, false);
    const float* dq = nullptr;
    Keys dk = none;
    if (dx) {
      dq = read_queries(head, dx, true, rest);
      dk = read_keys(head, dx, key, true, rest);
      out.scores(l, R, dk.rows, dq, true);
    }
    mix_back(l, P + at, Ss, out.v, false);
    if (dP) mix_back(l, dP + at, bs, out.v, true);
    // W is free again: first the pretrained scores' cotangent, then P tS.
    for (int64_t i = 0; i < n_scores; ++i) W[i] = P[at + i] * A[at + i] * scale;
    Arena last = rest;
    const Keys tk = read_keys(head, t, key, true, last);
    out.scores(l, W, tk.rows, read_queries(head, t, true, last), true);
    for (int64_t i = 0; i < n_scores; ++i) W[i] = P[at + i] * tS[at + i];
    mix_back(l, W, gs, out.v, true);
    out.write(head, S_x);
    if (!b_x) return;
    add_rows(l.Q() * l.hp(), dq, q);
    add_rows(l.T * l.hp(), dk.rows, k.rows);
    finetuned_cotangent(head, R, f.p, bs, k.rows, q, rest, b_x);
  });
}

static void attention_adjoint(const int64_t* sizes, float scale, const float* cos,
                              const float* sin, const float* x, const float* dx, const float* b,
                              const float* P, const float* dP, float* b_x, float* scratch,
                              int threads) {
  const AttentionLayout l(sizes, scale, cos, sin);
  each_head(l, scratch, attention_scratch(sizes), threads, [=](AttentionHead head, Arena arena) {
    const int64_t key = head.key_column(), value = head.value_column();
    const Keys none{nullptr, nullptr};
    const float* bs = read_queries(head, b, false, arena);
    const Keys v = read_keys(head, x, value, false, arena);
    const Keys dv = dx ? read_keys(head, dx, value, false, arena) : none;
    const FinetunedScores f = finetuned_scores(head, P, dP, bs, v, dv, arena);
    for (int64_t i = 0; i < l.Q() * l.tp(); ++i) f.a[i] *= f.p[i] * scale;
    float* q = read_queries(head, x, true, arena);
    const Keys k = read_keys(head, x, key, true, arena);
    if (dx) {
      add_rows(l.Q() * l.hp(), read_queries(head, dx, true, arena), q);
      add_rows(l.T * l.hp(), read_keys(head, dx, key, true, arena).rows, k.rows);
    }
    finetuned_cotangent(head, f.a, f.p, bs, k.rows, q, arena, b_x);
  });
}

}  // namespace FDA_ISA
}  // namespace fda
