// Launchers of the CUDA kernels. Each returns what cudaGetLastError says after its launches, and
// checks nothing about its pointers: fda_fast/ops/cuda has. All tensors are contiguous and on the
// current device; scratch is the caller's, so that torch's allocator and CUDA graphs keep working.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fda {
namespace cuda {

constexpr int kMaxSegments = 16;
constexpr int kMaxTerms = 128;
constexpr int kTermsPerLaunch = 32;

// A float32 matrix [K, S] of coefficients with strides in elements.
struct Coefficients {
  const float* values;
  int64_t stride_task, stride_segment;
};

// <g, u> and <g, v> of one parameter, as far as wanted, over [rows, width] of each task.
struct Term {
  const void *g, *u, *v;
  bool wants_u, wants_v;  // an empty tensor is at null and wanted
  int64_t offset;  // of the first element
  int64_t rows, width, stride_row;
  int64_t task_g, task_u, task_v;  // strides between tasks
  int64_t parameter;  // column of `dots` that the sums belong to
};

// Blocks of the first pass for each task.
int64_t alignment_chunks(int64_t count, const Term* terms);

// Sums of all terms; two launches for up to kTermsPerLaunch of them.
cudaError_t alignment_dots(
    int dtype, int64_t tasks, int64_t parameters,
    int64_t count, const Term* terms,  // host; each column of each plane of dots once
    float* partial, int64_t chunks,  // [2, K, alignment_chunks]
    float* dots,  // [2, K, P]
    cudaStream_t stream);

// alignment_dots, and alignment_coefficients in its second launch.
cudaError_t alignment_evaluate(
    int dtype, int64_t tasks, int64_t parameters,
    int64_t count, const Term* terms,
    float* partial, int64_t chunks, float* dots,
    const float* squares, const bool* active, float eps,
    float* loss, float* cosines, float* coefficients,
    cudaStream_t stream);

// out = alpha u + beta v + row
cudaError_t alignment_mix(
    int dtype, int64_t tasks, int64_t rows, int64_t o,
    int64_t segments, const int64_t* widths,
    Coefficients alpha, const void* u,  // [K, S], [K, R, o]
    Coefficients beta, const void* v,
    const void* row,  // [K, o] or null
    void* out,  // [K, R, o]
    cudaStream_t stream);

// Cosines, loss and the coefficients of M; fda_fast/ops/alignment.py has the formulas.
cudaError_t alignment_coefficients(
    int64_t tasks, int64_t parameters,
    const float* dots,  // [2, K, P]
    const float* squares,  // [K, P]
    const bool* active,  // [P]
    float eps,
    float* loss,  // [K]
    float* cosines,  // [K, P]
    float* coefficients,  // [2, K, P]
    cudaStream_t stream);

// What both optimisers take: Adam's constants, and the step as a number or as a device int64.
struct AdamArguments {
  float beta2, gain1, gain2, eps;
  float step_size, root;  // of a step the host knows
  const int64_t* step;  // [1] on the device, or null
  float lr, log_beta1, log_beta2;  // for a step on the device
};

// The best anchors kept, AdamW, the loss recorded; two launches.
cudaError_t adamw_step(
    int64_t tasks, int64_t n,
    float* anchors, const float* grad, float* exp_avg, float* exp_avg_sq,  // [K, n]
    const float* loss, float* best_loss,  // [K]
    float* best,  // [K, n]
    AdamArguments adam, float decay,
    int64_t step, float* history, int64_t capacity,  // [capacity, K] or null; row (step - 1) mod
    cudaStream_t stream);

// Chain rule to alpha, Adam, delta = sum_k alpha_k tau_k.
cudaError_t coefficients_update(
    int64_t tasks, int64_t n,
    float* alpha, const float* tau,  // [K, n]
    const float* grad,  // [n]
    float* exp_avg, float* exp_avg_sq,  // [n], moments of grad
    float* delta,  // [n]
    AdamArguments adam,
    cudaStream_t stream);

}  // namespace cuda
}  // namespace fda
