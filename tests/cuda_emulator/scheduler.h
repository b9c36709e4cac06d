// What the tests set and read: the stream launches must be on, the order of threads, the log.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

namespace emulator {

struct Launched {
  std::string kernel;
  dim3 grid, block;
};

// A launch on another stream fails.
void expect_stream(cudaStream_t stream);

// 0: threads and blocks in order; 1: in reverse; from 2 on: shuffled.
void choose_order(unsigned which);

// The launches since the last call.
std::vector<Launched> take_log();

}  // namespace emulator
