// What a CUDA source sees when emulated_build.py has it compiled by the host's C++ compiler.
//
// kernel<<<grid, block, shared, stream>>>(...) arrives here rewritten as a call of a Launcher, and
// __shared__ T name[n]; as a reference into storage of the block. Every load and store of a kernel
// is reported to accesses.cpp, because the sources are compiled with -fsanitize=thread and linked
// with the functions there in place of ThreadSanitizer's own.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

namespace emulator {

struct Configuration {
  const char* kernel;
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};

// Indices of the running thread; by value, so that reading one is no access to memory.
uint3 thread_index();
uint3 block_index();
uint3 block_size();
uint3 grid_size();

// Waits until all threads of the block are here.
void barrier();

// Waits until all lanes of the mask are here; the value that `lane` of this warp brought.
uint64_t exchange(unsigned mask, uint64_t value, int lane);
int lane_index();

// Storage of the block for the declaration number `site`, the same for all its threads.
void* shared_storage(int site, std::size_t bytes);

template <typename T>
T& shared(int site) {
  return *static_cast<T*>(shared_storage(site, sizeof(T)));
}

// Runs every thread of the grid; errors are cudaGetLastError's.
void run(const Configuration& configuration, const std::function<void()>& thread);

// From here on the running thread is in the kernel, and its accesses count.
void enter_kernel();

template <typename T>
T shuffle(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one shuffle moves up to eight bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

class Launcher {
 public:
  Launcher(const char* kernel, dim3 grid, dim3 block, std::size_t shared = 0,
           cudaStream_t stream = nullptr)
      : configuration_{kernel, grid, block, shared, stream} {}

  // Arguments are converted to the kernel's parameters once, as in a real launch.
  template <typename... P, typename... A>
  void operator()(void (*kernel)(P...), A&&... arguments) const {
    const std::tuple<P...> parameters(static_cast<P>(arguments)...);
    static_assert(sizeof parameters <= 4096, "a kernel takes at most 4 KB of parameters");
    run(configuration_, [&] {
      std::apply(
          [call = kernel](P... values) {
            const auto function = call;
            enter_kernel();
            function(values...);
          },
          parameters);
    });
  }

 private:
  Configuration configuration_;
};

}  // namespace emulator

#define __launch_bounds__(...)
#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())
#define __syncthreads() ::emulator::barrier()

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return ::emulator::shuffle(mask, value, ::emulator::lane_index() ^ lanes);
}

inline float __fsqrt_rn(float x) { return std::sqrt(x); }

// By value, as CUDA's are.
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
