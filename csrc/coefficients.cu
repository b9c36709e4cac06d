// Elementwise coefficients on task vectors: fda_fast/ops/coefficients.py.
#include "adam.cuh"
#include "common.cuh"

namespace fda {
namespace cuda {
namespace {

// One block: kThreads * N elements of grad, its moments and delta, and of every task's alpha and
// tau. The moments serve all tasks, and the sum over the tasks stays in registers.
template <int N>
__global__ void __launch_bounds__(kThreads) update_kernel(
    int64_t tasks, int64_t n, float* __restrict__ alpha, const float* __restrict__ tau,
    const float* __restrict__ grad, float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
    float* __restrict__ delta, AdamArguments arguments) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (column >= n) return;
  const Adam a = constants(arguments);
  float g[N], m[N], v[N], deviation[N], sum[N] = {};
  load<N>(grad + column, g);
  load<N>(exp_avg + column, m);
  load<N>(exp_avg_sq + column, v);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    moments(a, g[i], m[i], v[i]);
    deviation[i] = square_root(v[i]) / a.root;
  }
  store<N>(exp_avg + column, m);
  store<N>(exp_avg_sq + column, v);
  for (int64_t k = 0; k < tasks; ++k) {
    const int64_t at = k * n + column;
    float x[N], t[N];
    load<N>(alpha + at, x);
    load<N>(tau + at, t);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = scaled_adam(a, x[i], t[i], m[i], deviation[i]);
      sum[i] += x[i] * t[i];
    }
    store<N>(alpha + at, x);
  }
  store<N>(delta + column, sum);
}

}  // namespace

cudaError_t coefficients_update(int64_t tasks, int64_t n, float* alpha, const float* tau,
                                const float* grad, float* exp_avg, float* exp_avg_sq, float* delta,
                                AdamArguments adam, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const bool wide = n % 4 == 0 && all_aligned16(alpha, tau, grad, exp_avg, exp_avg_sq, delta);
  const int64_t blocks = ceil_div(n, kThreads * (wide ? 4 : 1));
  if (blocks > kMaxGridX) return cudaErrorInvalidConfiguration;
  const unsigned grid = static_cast<unsigned>(blocks);
  if (wide) {
    update_kernel<4><<<grid, kThreads, 0, stream>>>(tasks, n, alpha, tau, grad, exp_avg,
                                                    exp_avg_sq, delta, adam);
  } else {
    update_kernel<1><<<grid, kThreads, 0, stream>>>(tasks, n, alpha, tau, grad, exp_avg,
                                                    exp_avg_sq, delta, adam);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fda
