// Attention over short sequences, four sweeps and the adjoint: fda_fast/ops/attention.py.
//
// A head's matrices stay in the cache of the core that works on it; between the sweeps P, dP, A and
// tS [N, key_value, Q, tp] are kept, everything else is read again from the packed tensors.
#pragma once

#include "attention.h"

namespace fda {
namespace FDA_ISA {

// Score differences above which the plain difference of two softmaxes loses nothing.
constexpr float kFar = 20.0f;

// f(head, arena) for every head of every sequence; each thread has `room` float32 of scratch.
template <typename F>
static void each_head(const AttentionLayout& l, float* scratch, int64_t room, int threads,
                      const F& f) {
  const int64_t items = l.N * l.key_value;
  const int64_t shares = at_most(threads, items);
  parallel_for(shares, 1, threads, [&](int64_t share) {
    for (int64_t i = items * share / shares; i < items * (share + 1) / shares; ++i) {
      Arena arena{scratch + share * room};
      f(AttentionHead{l, i / l.key_value, i % l.key_value}, arena);
    }
  });
}

// Float32 of scratch that one thread needs, at most: what the reverse sweep takes.
static int64_t attention_scratch(const int64_t* sizes) {
  const AttentionLayout l(sizes, 1.0f, nullptr, nullptr);
  const int64_t queries = padded(l.Q() * l.hp()), scores = padded(l.Q() * l.tp());
  const int64_t keys = padded(l.T * l.hp()) + padded(l.hp());
  const int64_t flipped = padded(l.size * l.tp());
  return 7 * queries + 9 * keys + 5 * flipped + 3 * scores;
}

// p = softmax of one row of scores, within sight
static void softmax_row(int64_t T, Sight sight, const float* __restrict__ s,
                        float* __restrict__ p) {
  float high = s[sight.first];
#pragma omp simd reduction(max : high)
  for (int64_t i = sight.first; i < sight.last; ++i) high = s[i] > high ? s[i] : high;
  for (int64_t i = 0; i < T; ++i) p[i] = 0.0f;
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = sight.first; i < sight.last; ++i) {
    p[i] = exp_negative(high - s[i]).exp;
    sum += p[i];
  }
  const double inverse = 1.0 / sum;
#pragma omp simd
  for (int64_t i = sight.first; i < sight.last; ++i) p[i] = static_cast<float>(p[i] * inverse);
}

// dp = softmax(s + ds) - p without cancellation; s and ds are overwritten.
static void softmax_difference_row(int64_t T, Sight sight, float* __restrict__ s,
                                   float* __restrict__ ds, const float* __restrict__ p,
                                   float* __restrict__ dp) {
  const int64_t first = sight.first, seen = sight.last - first;
  const double mean = mean_under(seen, p + first, ds + first);
  float reach = -kFar;
#pragma omp simd reduction(max : reach)
  for (int64_t i = first; i < sight.last; ++i) {
    ds[i] = static_cast<float>(ds[i] - mean);
    reach = ds[i] > reach ? ds[i] : reach;
  }
  if (!(reach < kFar)) {
    for (int64_t i = first; i < sight.last; ++i) s[i] += ds[i];
    softmax_row(T, sight, s, dp);
    for (int64_t i = 0; i < T; ++i) dp[i] -= p[i];
    return;
  }
#pragma omp simd
  for (int64_t i = first; i < sight.last; ++i) ds[i] = expm1_below_88(ds[i]);
  const double moved = mean_under(seen, p + first, ds + first);
  const double inverse = 1.0 / (1.0 + moved);
  for (int64_t i = 0; i < T; ++i) dp[i] = 0.0f;
#pragma omp simd
  for (int64_t i = first; i < sight.last; ++i) {
    dp[i] = static_cast<float>(p[i] * (ds[i] - moved) * inverse);
  }
}

static void attention_forward(const int64_t* sizes, float scale, const float* cos,
                              const float* sin, const float* x, const float* dx, float* y,
                              float* dy, float* P, float* dP, float* scratch, int threads) {
  const AttentionLayout l(sizes, scale, cos, sin);
  each_head(l, scratch, attention_scratch(sizes), threads, [=](AttentionHead head, Arena arena) {
    const int64_t Q = l.Q(), T = l.T, tp = l.tp(), n_scores = Q * tp, n_queries = Q * l.hp();
    float* p = P + head.scores();
    float* q = read_queries(head, x, true, arena);
    const Keys k = read_keys(head, x, head.key_column(), true, arena);
    const Keys v = read_keys(head, x, head.value_column(), false, arena);
    const float* k_T = transposed(l, k.rows, arena);
    float* s = arena.take(n_scores);
    float* out = arena.take(n_queries);
    zero_beyond(Q, T, tp, p);
    scores_of(l, q, k_T, s, false);
    for (int64_t i = 0; i < n_scores; ++i) s[i] *= scale;
    for (int64_t r = 0; r < Q; ++r) softmax_row(T, Sight(l, r), s + r * tp, p + r * tp);
    mix(l, p, v.rows, out, false);
    write_queries(head, out, false, v.mean, y);
    if (!dx) return;

    float* dp = dP + head.scores();
    zero_beyond(Q, T, tp, dp);
    float* dq = read_queries(head, dx, true, arena);
    const Keys dk = read_keys(head, dx, head.key_column(), true, arena);
    const Keys dv = read_keys(head, dx, head.value_column(), false, arena);
    float* ds = arena.take(n_scores);
    scores_of(l, dq, k_T, ds, false);
    for (int64_t i = 0; i < n_queries; ++i) q[i] += dq[i];
    scores_of(l, q, transposed(l, dk.rows, arena), ds, true);
    for (int64_t i = 0; i < n_scores; ++i) ds[i] *= scale;
    for (int64_t r = 0; r < Q; ++r) {
      const int64_t at = r * tp;
      softmax_difference_row(T, Sight(l, r), s + at, ds + at, p + at, dp + at);
    }
    mix(l, dp, v.rows, out, false);
    for (int64_t i = 0; i < n_scores; ++i) ds[i] = p[i] + dp[i];
    mix(l, ds, dv.rows, out, true);
    write_queries(head, out, false, dv.mean, dy);
  });
}

// The cotangents of q, k and v of one head, from that of the scores R = scale q k^T (times scale)
// and that of the output: out = (R k, R^T q, P^T g), each term added to what is there.
struct HeadCotangents {
  float *q, *k, *v;
  HeadCotangents(const AttentionLayout& l, Arena& arena)
      : q(arena.take(l.Q() * l.hp())),
        k(arena.take(l.T * l.hp())),
        v(arena.take(l.T * l.hp())) {}
  void scores(const AttentionLayout& l, const float* R, const float* keys, const float* queries,
              bool add) {
    mix(l, R, keys, q, add);
    mix_back(l, R, queries, k, add);
  }
  void write(const AttentionHead& head, float* to) {
    write_queries(head, q, true, nullptr, to);
    write_keys(head, k, head.key_column(), true, to);
    write_keys(head, v, head.value_column(), false, to);
  }
};

static void attention_backward(const int64_t* sizes, float scale, const float* cos,
                               const float* sin, const float* x, const float* g, const float* P,
                               float* A, float* g_x, float* scratch, int threads) {
  const AttentionLayout l(sizes, scale, cos, sin);
  each_head(l, scratch, attention_scratch(sizes), threads, [=](AttentionHead head, Arena arena) {
    const int64_t tp = l.tp(), n_scores = l.Q() * tp;
    const float* p = P + head.scores();
    float* a = A + head.scores();
    const float* gs = read_queries(head, g, false, arena);
    const float* q = read_queries(head, x, true, arena);
    const Keys k = read_keys(head, x, head.key_column(), true, arena);
    const Keys v = read_keys(head, x, head.value_column(), false, arena);
    scores_of(l, gs, transposed(l, v.rows, arena), a, false);
    for (int64_t r = 0; r < l.Q(); ++r) off_mean(l.T, p + r * tp, a + r * tp);
    float* R = arena.take(n_scores);
    for (int64_t i = 0; i < n_scores; ++i) R[i] = p[i] * a[i] * scale;
    HeadCotangents out(l, arena);
    out.scores(l, R, k.rows, q, false);
    mix_back(l, p, gs, out.v, false);
    out.write(head, g_x);
  });
}

static void attention_tangent(const int64_t* sizes, float scale, const float* cos,
                              const float* sin, const float* x, const float* t, const float* P,
                              float* tS, float* t_y, float* scratch, int threads) {
  const AttentionLayout l(sizes, scale, cos, sin);
  each_head(l, scratch, attention_scratch(sizes), threads, [=](AttentionHead head, Arena arena) {
    const int64_t tp = l.tp(), n_scores = l.Q() * tp;
    const float* p = P + head.scores();
    float* ts = tS + head.scores();
    const float* q = read_queries(head, x, true, arena);
    const float* tq = read_queries(head, t, true, arena);
    const Keys k = read_keys(head, x, head.key_column(), true, arena);
    const Keys v = read_keys(head, x, head.value_column(), false, arena);
    const Keys tk = read_keys(head, t, head.key_column(), true, arena);
    const Keys tv = read_keys(head, t, head.value_column(), false, arena);
    scores_of(l, tq, transposed(l, k.rows, arena), ts, false);
    scores_of(l, q, transposed(l, tk.rows, arena), ts, true);
    for (int64_t i = 0; i < n_scores; ++i) ts[i] *= scale;
    for (int64_t r = 0; r < l.Q(); ++r) off_mean(l.T, p + r * tp, ts + r * tp);
    float* moved = arena.take(n_scores);
    for (int64_t i = 0; i < n_scores; ++i) moved[i] = p[i] * ts[i];
    float* out = arena.take(l.Q() * l.hp());
    mix(l, moved, v.rows, out, false);
    mix(l, p, tv.rows, out, true);
    write_queries(head, out, false, tv.mean, t_y);
  });
}

}  // namespace FDA_ISA
}  // namespace fda
