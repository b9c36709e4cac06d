// Dots and combinations over the segments of packed rows: fda_fast/ops/alignment.py.
#include "common.cuh"
#include "launchers.cuh"

namespace fda {
namespace cuda {
namespace {

// A block of the first pass adds about this many elements; fixed, so that the order of the
// additions depends on the shape alone.
constexpr int64_t kChunkElements = 32768;
// A column and the elements of a chunk behind it count in 32 bits.
constexpr int64_t kMaxRow = INT32_MAX;

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

// Whether every segment starts and ends at a multiple of four columns.
bool by_four(const Segments& segments) {
  for (int s = 0; s <= segments.count; ++s) {
    if (segments.start[s] % 4 != 0) return false;
  }
  return true;
}

// Terms of one launch, by value: nothing to copy to the device, and a recorded graph keeps them.
struct Batch {
  int count;
  Term terms[kTermsPerLaunch];
  bool wide[kTermsPerLaunch];
  int64_t first[kTermsPerLaunch + 1];  // chunk of each term, and the end
};

// Where the second pass finds the partial sums of a term.
struct Partials {
  int64_t first;
  uint32_t chunks;
  uint16_t parameter;
  bool u, v;
};

struct AllPartials {
  int count;
  Partials of[kMaxTerms];
};

struct CoefficientArguments {
  const float* squares;  // [K, P]
  const bool* active;    // [P]
  float eps;
  float *loss, *cosines, *out;  // [K], [K, P], [2, K, P]
};

int64_t chunks_of(const Term& t) { return ceil_div(t.rows * t.width, kChunkElements); }

// A term without gaps as one row, which needs no divisions.
Term flattened(Term t) {
  const bool dense = t.rows == 1 || t.stride_row == t.width;
  if (dense && t.rows * t.width <= kMaxRow) {
    t.width *= t.rows;
    t.rows = 1;
  }
  return t;
}

bool is_wide(const Term& t) {
  const bool whole = t.offset % 4 == 0 && t.width % 4 == 0 &&
                     (t.rows == 1 || t.stride_row % 4 == 0) && t.task_g % 4 == 0 &&
                     (!t.wants_u || t.task_u % 4 == 0) && (!t.wants_v || t.task_v % 4 == 0);
  return whole && all_aligned16(t.g, t.u, t.v);
}

// Adds elements [begin, begin + count) of the rows of one task to gu and gv.
template <int N, typename T>
__device__ __forceinline__ void accumulate(const Term& t, int64_t task, int64_t begin,
                                           uint32_t count, float& gu, float& gv) {
  const T* g = static_cast<const T*>(t.g) + t.offset + task * t.task_g;
  const T* u = static_cast<const T*>(t.u) + t.offset + task * t.task_u;
  const T* v = static_cast<const T*>(t.v) + t.offset + task * t.task_v;
  const uint32_t width = static_cast<uint32_t>(t.width);
  const int64_t row = begin / t.width;
  const uint32_t column = static_cast<uint32_t>(begin % t.width);
  for (uint32_t i = threadIdx.x * N; i < count; i += kThreads * N) {
    const uint32_t c = column + i;
    const int64_t at = (row + c / width) * t.stride_row + c % width;
    float gs[N], us[N] = {}, vs[N] = {};
    load<N>(g + at, gs);
    if (t.wants_u) load<N>(u + at, us);
    if (t.wants_v) load<N>(v + at, vs);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      gu += gs[j] * us[j];
      gv += gs[j] * vs[j];
    }
  }
}

// One block: a chunk of one term, of task blockIdx.y.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_kernel(
    const __grid_constant__ Batch batch, int64_t chunks,
    float* __restrict__ partial) {  // [2, K, chunks]
  __shared__ float shared[kWarps];
  const int64_t chunk = batch.first[0] + blockIdx.x, task = blockIdx.y;
  int s = 0;
  while (s + 1 < batch.count && chunk >= batch.first[s + 1]) ++s;
  const Term& term = batch.terms[s];
  const int64_t begin = (chunk - batch.first[s]) * kChunkElements;
  const uint32_t count =
      static_cast<uint32_t>(min(kChunkElements, term.rows * term.width - begin));
  float gu = 0.0f, gv = 0.0f;
  if (batch.wide[s]) {
    accumulate<4, T>(term, task, begin, count, gu, gv);
  } else {
    accumulate<1, T>(term, task, begin, count, gu, gv);
  }
  gu = block_sum(gu, shared);
  gv = block_sum(gv, shared);
  if (threadIdx.x == 0) {
    partial[task * chunks + chunk] = gu;
    partial[(gridDim.y + task) * chunks + chunk] = gv;
  }
}

// Cosines, loss and coefficients of one task, by one warp.
__device__ __forceinline__ void coefficients(int64_t task, int64_t tasks, int64_t parameters,
                                             const float* dots, const CoefficientArguments& a) {
  const int64_t plane = tasks * parameters;
  float sum = 0.0f;
  for (int64_t p = threadIdx.x % 32; p < parameters; p += 32) {
    const int64_t at = task * parameters + p;
    const float dot = dots[at], square = dots[plane + at];
    const float norm_t = __fsqrt_rn(a.squares[at]);
    // Comparisons are written so that a NaN stays one and reaches the loss.
    const float norm_g = square < 0.0f ? 0.0f : __fsqrt_rn(square);
    const float floored_g = norm_g < a.eps ? a.eps : norm_g;
    const float floored_t = norm_t < 1e-8f ? 1e-8f : norm_t;
    const bool used = a.active[p] && norm_t > 0.0f;
    const float cosine = used ? dot / (floored_g * floored_t) : 0.0f;
    a.cosines[at] = cosine;
    a.out[at] = used ? -1.0f / (floored_g * floored_t) : 0.0f;
    a.out[plane + at] = norm_g == 0.0f ? 0.0f : cosine / (floored_g * norm_g);
    sum += 1.0f - cosine;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) a.loss[task] = sum;
}

// One block: the sums of one task, each by one warp and always in the same order; then, if they
// are wanted, the coefficients.
template <bool kCoefficients>
__global__ void __launch_bounds__(kThreads) finish_kernel(
    const __grid_constant__ AllPartials all, const float* __restrict__ partial, int64_t chunks,
    int64_t parameters, float* dots, CoefficientArguments arguments) {
  const int64_t task = blockIdx.x, tasks = gridDim.x;
  for (int s = threadIdx.x / 32; s < 2 * all.count; s += kWarps) {
    const Partials& one = all.of[s / 2];
    const int64_t row = s % 2 * tasks + task;
    if (!(s % 2 ? one.v : one.u)) continue;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x % 32; i < one.chunks; i += 32) {
      sum += partial[row * chunks + one.first + i];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) dots[row * parameters + one.parameter] = sum;
  }
  if (!kCoefficients) return;
  __syncthreads();
  if (threadIdx.x < 32) coefficients(task, tasks, parameters, dots, arguments);
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
    int64_t parameters, const float* __restrict__ dots, CoefficientArguments arguments) {
  coefficients(blockIdx.x, gridDim.x, parameters, dots, arguments);
}

template <typename T>
cudaError_t launch_sums(int64_t tasks, int64_t count, const Term* terms, float* partial,
                        int64_t chunks, cudaStream_t stream) {
  int64_t chunk = 0;
  for (int64_t begin = 0; begin < count; begin += kTermsPerLaunch) {
    Batch batch;
    const int64_t left = count - begin;
    batch.count = left < kTermsPerLaunch ? static_cast<int>(left) : kTermsPerLaunch;
    batch.first[0] = chunk;
    for (int s = 0; s < batch.count; ++s) {
      batch.terms[s] = flattened(terms[begin + s]);
      batch.wide[s] = is_wide(batch.terms[s]);
      batch.first[s + 1] = chunk += chunks_of(batch.terms[s]);
    }
    const int64_t blocks = chunk - batch.first[0];
    if (blocks == 0) continue;
    if (blocks > kMaxGridX) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tasks));
    sum_kernel<T><<<grid, kThreads, 0, stream>>>(batch, chunks, partial);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool read_terms(int64_t count, const Term* terms, int64_t parameters, AllPartials& out) {
  if (count > kMaxTerms || parameters > UINT16_MAX) return false;
  out.count = static_cast<int>(count);
  int64_t chunk = 0;
  for (int s = 0; s < out.count; ++s) {
    const Term& t = terms[s];
    const int64_t chunks = chunks_of(t);
    if (t.width > kMaxRow || t.parameter < 0 || t.parameter >= parameters) return false;
    out.of[s] = {chunk, static_cast<uint32_t>(chunks), static_cast<uint16_t>(t.parameter),
                 t.wants_u, t.wants_v};
    chunk += chunks;
  }
  return true;
}

template <bool kCoefficients>
cudaError_t sum_and_finish(int dtype, int64_t tasks, int64_t parameters, int64_t count,
                           const Term* terms, float* partial, int64_t chunks, float* dots,
                           const CoefficientArguments& arguments, cudaStream_t stream) {
  AllPartials all;
  if (!read_terms(count, terms, parameters, all) || chunks != alignment_chunks(count, terms)) {
    return cudaErrorInvalidValue;
  }
  if (tasks == 0) return cudaSuccess;
  if (tasks > kMaxGridYZ) return cudaErrorInvalidConfiguration;
  FDA_DISPATCH(dtype, T, {
    const cudaError_t error = launch_sums<T>(tasks, count, terms, partial, chunks, stream);
    if (error != cudaSuccess) return error;
  })
  const unsigned grid = static_cast<unsigned>(tasks);
  finish_kernel<kCoefficients><<<grid, kThreads, 0, stream>>>(all, partial, chunks, parameters,
                                                              dots, arguments);
  return cudaGetLastError();
}

}  // namespace

int64_t alignment_chunks(int64_t count, const Term* terms) {
  int64_t chunks = 0;
  for (int64_t s = 0; s < count; ++s) chunks += chunks_of(terms[s]);
  return chunks;
}

cudaError_t alignment_dots(int dtype, int64_t tasks, int64_t parameters, int64_t count,
                           const Term* terms, float* partial, int64_t chunks, float* dots,
                           cudaStream_t stream) {
  return sum_and_finish<false>(dtype, tasks, parameters, count, terms, partial, chunks, dots, {},
                               stream);
}

cudaError_t alignment_evaluate(int dtype, int64_t tasks, int64_t parameters, int64_t count,
                               const Term* terms, float* partial, int64_t chunks, float* dots,
                               const float* squares, const bool* active, float eps, float* loss,
                               float* cosines, float* coefficients, cudaStream_t stream) {
  const CoefficientArguments arguments{squares, active, eps, loss, cosines, coefficients};
  return sum_and_finish<true>(dtype, tasks, parameters, count, terms, partial, chunks, dots,
                              arguments, stream);
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
  const CoefficientArguments arguments{squares, active, eps, loss, cosines, coefficients};
  coefficients_kernel<<<static_cast<unsigned>(tasks), 32, 0, stream>>>(parameters, dots, arguments);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fda
