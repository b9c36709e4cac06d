// The best anchors kept, AdamW, the loss recorded: fda_fast/ops/adamw.py.
#include "adam.cuh"
#include "common.cuh"

namespace fda {
namespace cuda {
namespace {

// One block: kThreads * N elements of one task (blockIdx.y). best_loss is only read here, as
// other blocks of the task read it too.
template <int N>
__global__ void __launch_bounds__(kThreads) step_kernel(
    int64_t n, float* __restrict__ anchors, const float* __restrict__ grad,
    float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq, const float* __restrict__ loss,
    const float* __restrict__ best_loss, float* __restrict__ best, AdamArguments arguments,
    float decay) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (column >= n) return;
  const int64_t task = blockIdx.y, at = task * n + column;
  const Adam a = constants(arguments);
  float x[N], g[N], m[N], v[N];
  load<N>(anchors + at, x);
  load<N>(grad + at, g);
  load<N>(exp_avg + at, m);
  load<N>(exp_avg_sq + at, v);
  if (loss[task] < best_loss[task]) store<N>(best + at, x);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = adam(a, decay * x[i], g[i], m[i], v[i]);
  store<N>(anchors + at, x);
  store<N>(exp_avg + at, m);
  store<N>(exp_avg_sq + at, v);
}

__global__ void __launch_bounds__(kThreads) record_kernel(
    int64_t tasks, const float* __restrict__ loss, float* __restrict__ best_loss,
    const int64_t* __restrict__ device_step, int64_t step, float* __restrict__ history,
    int64_t capacity) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (task >= tasks) return;
  const float value = loss[task];
  if (value < best_loss[task]) best_loss[task] = value;
  if (history) {
    if (device_step) step = *device_step;
    history[(step - 1) % capacity * tasks + task] = value;
  }
}

}  // namespace

cudaError_t adamw_step(int64_t tasks, int64_t n, float* anchors, const float* grad, float* exp_avg,
                       float* exp_avg_sq, const float* loss, float* best_loss, float* best,
                       AdamArguments adam, float decay, int64_t step, float* history,
                       int64_t capacity, cudaStream_t stream) {
  if (tasks == 0) return cudaSuccess;
  if (tasks > kMaxGridYZ) return cudaErrorInvalidConfiguration;
  if (n > 0) {
    const bool wide =
        n % 4 == 0 && all_aligned16(anchors, grad, exp_avg, exp_avg_sq, best);
    const int64_t blocks = ceil_div(n, kThreads * (wide ? 4 : 1));
    if (blocks > kMaxGridX) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tasks));
    if (wide) {
      step_kernel<4><<<grid, kThreads, 0, stream>>>(n, anchors, grad, exp_avg, exp_avg_sq, loss,
                                                    best_loss, best, adam, decay);
    } else {
      step_kernel<1><<<grid, kThreads, 0, stream>>>(n, anchors, grad, exp_avg, exp_avg_sq, loss,
                                                    best_loss, best, adam, decay);
    }
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  record_kernel<<<static_cast<unsigned>(ceil_div(tasks, kThreads)), kThreads, 0, stream>>>(
      tasks, loss, best_loss, adam.step, step, history, capacity);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fda
