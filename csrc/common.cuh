// What every CUDA kernel here shares: sizes, dtypes, 4-wide access, sums in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridYZ = 65535;

// Storage types, in the order of fda_fast/ops/cuda/call.py.
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

template <typename... P>
bool all_aligned16(const P*... pointers) {
  return (aligned16(pointers) && ...);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

// N values, moved with one access: N is 1, or 4 where the address is a multiple of 4 elements.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <int N, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.value[i]);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.value[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Sum over the warp, in every lane; always the same tree.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Sum over the block of kThreads, valid in thread 0; `shared` holds kWarps floats.
__device__ __forceinline__ float block_sum(float x, float* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x < 32) x = warp_sum(threadIdx.x < kWarps ? shared[threadIdx.x] : 0.0f);
  return x;
}

}  // namespace fda

// Runs `...` with T the storage type; an unknown dtype is cudaErrorInvalidValue.
#define FDA_DISPATCH(dtype, T, ...)                       \
  switch (static_cast<::fda::Dtype>(dtype)) {             \
    case ::fda::Dtype::float32: {                         \
      using T = float;                                    \
      __VA_ARGS__;                                        \
      break;                                              \
    }                                                     \
    case ::fda::Dtype::bfloat16: {                        \
      using T = __nv_bfloat16;                            \
      __VA_ARGS__;                                        \
      break;                                              \
    }                                                     \
    case ::fda::Dtype::float16: {                         \
      using T = __half;                                   \
      __VA_ARGS__;                                        \
      break;                                              \
    }                                                     \
    default:                                              \
      return cudaErrorInvalidValue;                       \
  }
