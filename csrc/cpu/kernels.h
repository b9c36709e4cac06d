// Every CPU kernel, as a table of functions: one table for each instruction set that was compiled.
//
// All data are contiguous float32. A null pointer stands for a value that is exactly zero (input)
// or not wanted (output). Sizes are counts of elements; `threads` is torch.get_num_threads().
#pragma once

#include <stdint.h>

namespace fda {

struct Kernels {
  const char* isa;

  // Activation, n elements; kind as in math.h.
  void (*activation_forward)(int kind, int64_t n, const float* x, const float* dx, float* y,
                             float* dy, int threads);
  // out = phi'(x + dx) v
  void (*activation_slope)(int kind, int64_t n, const float* x, const float* dx, const float* v,
                           float* out, int threads);
  void (*activation_reverse)(int kind, int64_t n, const float* x, const float* dx, const float* g,
                             const float* t, const float* S, const float* b, float* S_x,
                             float* b_x, int threads);

  // Gated activation, x [rows, 2 h] = [gate | up], y [rows, h].
  void (*gated_forward)(int kind, int64_t rows, int64_t h, const float* x, const float* dx,
                        float* y, float* dy, int threads);
  // (gate, up) of out = (phi'(gate) up g, phi(gate) g) at x + dx
  void (*gated_backward)(int kind, int64_t rows, int64_t h, const float* x, const float* dx,
                         const float* g, float* out, int threads);
  void (*gated_tangent)(int kind, int64_t rows, int64_t h, const float* x, const float* t,
                        float* out, int threads);
  void (*gated_reverse)(int kind, int64_t rows, int64_t h, const float* x, const float* dx,
                        const float* g, const float* t, const float* S, const float* b,
                        float* S_x, float* b_x, int threads);

  // LayerNorm (center 1) and RMSNorm (0) of K * R rows of d; parameters [d], their task vectors and
  // tangents [K, d]. `partial`: see norm_backward.h; null if neither G_w nor G_c is wanted.
  void (*norm_forward)(int center, int64_t K, int64_t R, int64_t d, const float* x,
                       const float* dx, const float* w, const float* c, const float* tw,
                       const float* tb, double eps, float* y, float* dy, int threads);
  void (*norm_backward)(int center, int64_t K, int64_t R, int64_t d, const float* x,
                        const float* dx, const float* g, const float* w, const float* tw,
                        double eps, float* g_x, float* G_w, float* G_c, float* partial,
                        int threads);
  void (*norm_tangent)(int center, int64_t K, int64_t R, int64_t d, const float* x,
                       const float* t, const float* w, const float* mw, const float* mb,
                       double eps, float* out, int threads);
  void (*norm_reverse)(int center, int64_t K, int64_t R, int64_t d, const float* x,
                       const float* dx, const float* g, const float* t, const float* S,
                       const float* b, const float* w, const float* tw, const float* mw,
                       double eps, float* S_x, float* b_x, int threads);

  // Similarity of K * A anchors of d; kind 0 cosine, 1 l2, 2 l1; `each` is scratch [K, A].
  void (*similarity_forward)(int kind, int64_t K, int64_t A, int64_t d, const float* y,
                             const float* dy, double scale, double* each, float* s, float* g,
                             int threads);
  void (*similarity_reverse)(int64_t K, int64_t A, int64_t d, const float* y, const float* dy,
                             const float* t, double scale, float* S, float* b, int threads);

  // Alignment over packed rows [K, R, o]; see alignment.h.
  void (*alignment_dots)(int64_t K, int64_t R, int64_t o, int64_t segments,
                         const int64_t* widths, const float* g, const float* u, const float* v,
                         double* partial, float* out, int threads);
  void (*alignment_mix)(int64_t K, int64_t R, int64_t o, int64_t segments, const int64_t* widths,
                        const float* alpha, const float* u, const float* beta, const float* v,
                        const float* row, float* out, int threads);
  void (*alignment_coefficients)(int64_t K, int64_t P, const float* dots, const float* squares,
                                 const unsigned char* active, double eps, float* loss,
                                 float* cosines, float* coefficients);

  // Attention of N sequences; sizes = {N, T, query heads, key/value heads, head size, window,
  // rotary columns}, see AttentionLayout in attention.h. P, dP, A, tS are [N, key_value, Q, tp];
  // scratch holds attention_scratch(sizes) float32 for each thread.
  int64_t (*attention_scratch)(const int64_t* sizes);
  void (*attention_forward)(const int64_t* sizes, float scale, const float* cos, const float* sin,
                            const float* x, const float* dx, float* y, float* dy, float* P,
                            float* dP, float* scratch, int threads);
  void (*attention_backward)(const int64_t* sizes, float scale, const float* cos,
                             const float* sin, const float* x, const float* g, const float* P,
                             float* A, float* g_x, float* scratch, int threads);
  void (*attention_tangent)(const int64_t* sizes, float scale, const float* cos, const float* sin,
                            const float* x, const float* t, const float* P, float* tS, float* t_y,
                            float* scratch, int threads);
  void (*attention_reverse)(const int64_t* sizes, float scale, const float* cos, const float* sin,
                            const float* x, const float* dx, const float* g, const float* t,
                            const float* S, const float* b, const float* P, const float* dP,
                            const float* A, const float* tS, float* S_x, float* b_x,
                            float* scratch, int threads);
  void (*attention_adjoint)(const int64_t* sizes, float scale, const float* cos, const float* sin,
                            const float* x, const float* dx, const float* b, const float* P,
                            const float* dP, float* b_x, float* scratch, int threads);

  // One Adam update with decoupled weight decay on K tasks of n elements; where loss < best_loss,
  // best = anchors (before the update) first. gain = 1 - beta, step_size = lr / (1 - beta1^step),
  // root = sqrt(1 - beta2^step), decay = 1 - lr * weight_decay.
  void (*adamw_step)(int64_t K, int64_t n, float* anchors, const float* grad, float* exp_avg,
                     float* exp_avg_sq, const float* loss, float* best_loss, float* best,
                     float beta2, float gain1, float gain2, float step_size, float root,
                     float eps, float decay, int threads);

  // Adam on alpha [K, n] with gradient grad * tau_k, then delta = sum_k alpha_k tau_k. The moments
  // [n] are those of grad: fda_fast/ops/coefficients.py.
  void (*coefficients_update)(int64_t K, int64_t n, float* alpha, const float* tau,
                              const float* grad, float* exp_avg, float* exp_avg_sq, float* delta,
                              float beta2, float gain1, float gain2, float step_size, float root,
                              float eps, int threads);
};

namespace baseline {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

}  // namespace fda
