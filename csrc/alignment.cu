// Dots and combinations over the segments of packed rows: fda_fast/ops/alignment.py.
#include "common.cuh"
#include "launchers.cuh"

namespace fda {
namespace cuda {
namespace {

// A block of the first pass adds about this many elements; fixed, so that the order of the
// additions depends on the shape alone.
constexpr int64_t kChunkElements = 32768;

// First column of each segment and the end, by value: nothing to copy to the device.
struct Segments {
  int count;
  int64_t start[kMaxSegments + 1];
};

bool read_segments(int64_t count, const int64_t* widths, Segments& out) {
  if (count < 1 || count > kMaxSegments) return false;
  out.count = static_cast<int>(count);
  out.start[0] = 0;
  for (int s = 0; s < out.count; ++s) out.start[s + 1] = out.start[s] + widths[s];
  return true;
}

int64_t rows_per_chunk(int64_t segments, const int64_t* widths) {
  int64_t widest = 1;
  for (int64_t s = 0; s < segments; ++s) widest = widths[s] > widest ? widths[s] : widest;
  return widest < kChunkElements ? kChunkElements / widest : 1;
}

// Whether every segment starts and ends at a multiple of four columns.
bool by_four(const Segments& segments) {
  for (int s = 0; s <= segments.count; ++s) {
    if (segments.start[s] % 4 != 0) return false;
  }
  return true;
}

// One block: a chunk of rows of one segment (blockIdx.y) of one task (blockIdx.z).
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) dots_kernel(
    const T* __restrict__ g, const T* __restrict__ u, const T* __restrict__ v,  // [K, R, o]
    Segments segments, int64_t rows, int64_t o, int64_t chunk_rows,
    float* __restrict__ partial) {  // [2, K, S, chunks]
  __shared__ float shared[kWarps];
  const int64_t chunk = blockIdx.x, s = blockIdx.y, task = blockIdx.z;
  const int64_t first = segments.start[s], last = segments.start[s + 1];
  const int64_t end = min((chunk + 1) * chunk_rows, rows);
  float gu = 0.0f, gv = 0.0f;
  for (int64_t row = chunk * chunk_rows; row < end; ++row) {
    const int64_t base = (task * rows + row) * o;
    for (int64_t c = first + threadIdx.x * N; c < last; c += kThreads * N) {
      float gs[N], us[N], vs[N];
      load<N>(g + base + c, gs);
      load<N>(u + base + c, us);
      load<N>(v + base + c, vs);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        gu += gs[i] * us[i];
        gv += gs[i] * vs[i];
      }
    }
  }
  const int64_t at = ((task * gridDim.y + s) * gridDim.x) + chunk;
  const int64_t plane = static_cast<int64_t>(gridDim.z) * gridDim.y * gridDim.x;
  gu = block_sum(gu, shared);
  gv = block_sum(gv, shared);
  if (threadIdx.x == 0) {
    partial[at] = gu;
    partial[plane + at] = gv;
  }
}

// One block: the sum of one row of `partial`, always in the same order.
__global__ void __launch_bounds__(kThreads) finish_kernel(
    const float* __restrict__ partial,  // [rows, chunks]
    int64_t chunks, float* __restrict__ out) {  // [rows]
  __shared__ float shared[kWarps];
  const float* row = partial + blockIdx.x * chunks;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += row[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__device__ __forceinline__ float coefficient(const Coefficients& c, const Segments& segments,
                                             int64_t task, int64_t column) {
  int s = 0;
  while (s + 1 < segments.count && column >= segments.start[s + 1]) ++s;
  return c.values[task * c.stride_task + s * c.stride_segment];
}

// One block: kThreads * N columns of one row. N columns share a segment.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) mix_kernel(
    Coefficients alpha, const T* __restrict__ u, Coefficients beta, const T* __restrict__ v,
    const T* __restrict__ row,  // [K, o] or null
    Segments segments, int64_t rows, int64_t o, int64_t blocks_per_row, T* __restrict__ out) {
  const int64_t r = blockIdx.x / blocks_per_row;
  const int64_t c = (blockIdx.x % blocks_per_row * kThreads + threadIdx.x) * N;
  if (c >= o) return;
  const int64_t task = r / rows;
  const float a = coefficient(alpha, segments, task, c);
  const float b = coefficient(beta, segments, task, c);
  float us[N], vs[N], ws[N] = {};
  load<N>(u + r * o + c, us);
  load<N>(v + r * o + c, vs);
  if (row) load<N>(row + task * o + c, ws);
#pragma unroll
  for (int i = 0; i < N; ++i) us[i] = a * us[i] + b * vs[i] + ws[i];
  store<N>(out + r * o + c, us);
}

// One warp: one task.
__global__ void __launch_bounds__(32) coefficients_kernel(
    int64_t parameters, const float* __restrict__ dots, const float* __restrict__ squares,
    const bool* __restrict__ active, float eps, float* __restrict__ loss,
    float* __restrict__ cosines, float* __restrict__ out) {
  const int64_t task = blockIdx.x;
  const int64_t plane = static_cast<int64_t>(gridDim.x) * parameters;
  float sum = 0.0f;
  for (int64_t p = threadIdx.x; p < parameters; p += 32) {
    const int64_t at = task * parameters + p;
    const float dot = dots[at], square = dots[plane + at];
    const float norm_t = __fsqrt_rn(squares[at]);
    // Comparisons are written so that a NaN stays one and reaches the loss.
    const float norm_g = square < 0.0f ? 0.0f : __fsqrt_rn(square);
    const float floored_g = norm_g < eps ? eps : norm_g;
    const float floored_t = norm_t < 1e-8f ? 1e-8f : norm_t;
    const bool used = active[p] && norm_t > 0.0f;
    const float cosine = used ? dot / (floored_g * floored_t) : 0.0f;
    cosines[at] = cosine;
    out[at] = used ? -1.0f / (floored_g * floored_t) : 0.0f;
    out[plane + at] = norm_g == 0.0f ? 0.0f : cosine / (floored_g * norm_g);
    sum += 1.0f - cosine;
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) loss[task] = sum;
}

}  // namespace

int64_t alignment_chunks(int64_t rows, int64_t segments, const int64_t* widths) {
  return ceil_div(rows, rows_per_chunk(segments, widths));
}

cudaError_t alignment_dots(int dtype, int64_t tasks, int64_t rows, int64_t o, int64_t segments,
                           const int64_t* widths, const void* g, const void* u, const void* v,
                           float* partial, float* out, cudaStream_t stream) {
  Segments parts;
  if (!read_segments(segments, widths, parts)) return cudaErrorInvalidValue;
  const int64_t chunks = alignment_chunks(rows, segments, widths);
  if (tasks == 0) return cudaSuccess;
  if (rows == 0 || o == 0) {
    return cudaMemsetAsync(out, 0, 2 * tasks * segments * sizeof(float), stream);
  }
  if (chunks > kMaxGridX || tasks > kMaxGridYZ) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(segments),
                  static_cast<unsigned>(tasks));
  const int64_t chunk_rows = rows_per_chunk(segments, widths);
  const bool wide = by_four(parts) && all_aligned16(g, u, v);
  FDA_DISPATCH(dtype, T, {
    const T *gs = static_cast<const T*>(g), *us = static_cast<const T*>(u),
            *vs = static_cast<const T*>(v);
    if (wide) {
      dots_kernel<T, 4><<<grid, kThreads, 0, stream>>>(gs, us, vs, parts, rows, o, chunk_rows,
                                                       partial);
    } else {
      dots_kernel<T, 1><<<grid, kThreads, 0, stream>>>(gs, us, vs, parts, rows, o, chunk_rows,
                                                       partial);
    }
  })
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  finish_kernel<<<static_cast<unsigned>(2 * tasks * segments), kThreads, 0, stream>>>(partial,
                                                                                      chunks, out);
  return cudaGetLastError();
}

cudaError_t alignment_mix(int dtype, int64_t tasks, int64_t rows, int64_t o, int64_t segments,
                          const int64_t* widths, Coefficients alpha, const void* u,
                          Coefficients beta, const void* v, const void* row, void* out,
                          cudaStream_t stream) {
  Segments parts;
  if (!read_segments(segments, widths, parts)) return cudaErrorInvalidValue;
  if (tasks * rows * o == 0) return cudaSuccess;
  const bool wide = by_four(parts) && all_aligned16(u, v, row, out);
  const int64_t per_row = ceil_div(o, kThreads * (wide ? 4 : 1));
  const int64_t blocks = tasks * rows * per_row;
  if (blocks > kMaxGridX) return cudaErrorInvalidConfiguration;
  FDA_DISPATCH(dtype, T, {
    const T *us = static_cast<const T*>(u), *vs = static_cast<const T*>(v),
            *ws = static_cast<const T*>(row);
    T* outs = static_cast<T*>(out);
    const unsigned grid = static_cast<unsigned>(blocks);
    if (wide) {
      mix_kernel<T, 4><<<grid, kThreads, 0, stream>>>(alpha, us, beta, vs, ws, parts, rows, o,
                                                      per_row, outs);
    } else {
      mix_kernel<T, 1><<<grid, kThreads, 0, stream>>>(alpha, us, beta, vs, ws, parts, rows, o,
                                                      per_row, outs);
    }
  })
  return cudaGetLastError();
}

cudaError_t alignment_coefficients(int64_t tasks, int64_t parameters, const float* dots,
                                   const float* squares, const bool* active, float eps,
                                   float* loss, float* cosines, float* coefficients,
                                   cudaStream_t stream) {
  if (tasks == 0) return cudaSuccess;
  coefficients_kernel<<<static_cast<unsigned>(tasks), 32, 0, stream>>>(
      parameters, dots, squares, active, eps, loss, cosines, coefficients);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fda
