// Which memory a kernel may touch, and who touched it: between the scheduler and accesses.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace emulator {

// The thread that is running, as far as races are concerned: two threads of a block are ordered
// by a barrier between them (`interval` counts those), threads of different blocks by nothing.
struct Running {
  bool kernel = false;  // false: host code, whose accesses are nobody's business
  uint32_t launch = 0, block = 0, interval = 0, thread = 0;
  std::uintptr_t stacks_begin = 0, stacks_end = 0;
};
extern Running running;

// Lets kernels touch [begin, begin + bytes). The bytes of a `fresh` area must be written before
// they are read.
void allow(const void* begin, std::size_t bytes, std::string name, bool fresh = false);
void forbid(const void* begin);
void forbid_all();
bool allowed(const void* begin, std::size_t bytes);

// Ends the running thread, and with it the launch.
void fail(cudaError_t error, const std::string& why);

}  // namespace emulator
