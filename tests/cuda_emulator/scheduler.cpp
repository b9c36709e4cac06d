// Threads of a block as fibers of one system thread: run, wait at barriers and shuffles, stop.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "emulator.h"
#include "memory.h"
#include "scheduler.h"

namespace emulator {

Running running;

namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr unsigned kMaxGridYZ = 65535;

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
  ucontext_t context;
  State state;
  bool in_kernel;
  uint3 index;
  unsigned mask;  // of the shuffle it waits at
  int lane;
  uint64_t value, received;
};

// The launch that is running.
const std::function<void()>* body;
uint3 grid, block, at;  // sizes, and the index of the running block
std::vector<Fiber> fibers;
Fiber* current;
ucontext_t scheduler;
char* stacks;
std::map<int, void*> shared_blocks;

// What the host sees.
cudaError_t last_error = cudaSuccess;
std::string last_message;
cudaStream_t expected_stream;
unsigned seed;
std::vector<Launched> log;

std::string name(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

void report(cudaError_t error, const std::string& why) {
  if (last_error != cudaSuccess) return;
  last_error = error;
  last_message = why;
}

bool stream_is_right(cudaStream_t stream, const char* what) {
  if (stream == expected_stream) return true;
  report(cudaErrorInvalidResourceHandle, std::string(what) + " is not on the current stream");
  return false;
}

void start() {
  (*body)();
  current->state = State::done;
}

void wait(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}

void prepare() {
  for (std::size_t t = 0; t < fibers.size(); ++t) {
    Fiber& f = fibers[t];
    f.state = State::ready;
    f.in_kernel = false;
    f.index = {unsigned(t % block.x), unsigned(t / block.x % block.y),
               unsigned(t / block.x / block.y)};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks + t * kStack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, start, 0);
  }
}

// Every order of threads and blocks must give the same results; `seed` chooses one.
std::vector<unsigned> order(std::size_t count) {
  std::vector<unsigned> out(count);
  std::iota(out.begin(), out.end(), 0u);
  if (seed == 1) std::reverse(out.begin(), out.end());
  uint32_t random = seed;
  for (std::size_t i = count; seed > 1 && i > 1; --i) {
    random = random * 1664525u + 1013904223u;
    std::swap(out[i - 1], out[(random >> 8) % i]);
  }
  return out;
}

unsigned waiting_lanes(std::size_t first) {
  unsigned lanes = 0;
  for (std::size_t t = first; t < std::min(first + kWarp, fibers.size()); ++t) {
    if (fibers[t].state == State::at_shuffle) lanes |= 1u << (t - first);
  }
  return lanes;
}

// Lets the shuffles go whose lanes have all come; whether there were any.
bool release_shuffles() {
  bool released = false;
  for (std::size_t first = 0; first < fibers.size(); first += kWarp) {
    const unsigned here = waiting_lanes(first);
    unsigned going = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(here >> lane & 1)) continue;
      const unsigned mask = fibers[first + lane].mask;
      bool complete = (mask & here) == mask && (mask >> lane & 1);
      for (unsigned other = 0; other < kWarp && complete; ++other) {
        if (mask >> other & 1) complete = fibers[first + other].mask == mask;
      }
      if (complete) going |= 1u << lane;
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(going >> lane & 1)) continue;
      Fiber& f = fibers[first + lane];
      const bool named = f.lane >= 0 && f.lane < int(kWarp) && (going >> f.lane & 1);
      f.received = fibers[first + (named ? unsigned(f.lane) : lane)].value;
      f.state = State::ready;
      released = true;
    }
  }
  return released;
}

bool release_barrier() {
  for (const Fiber& f : fibers) {
    if (f.state != State::at_barrier) return false;
  }
  for (Fiber& f : fibers) f.state = State::ready;
  ++running.interval;
  return true;
}

void report_stuck(const char* kernel) {
  const char* const names[] = {"ready", "waits at __syncthreads", "waits at a shuffle", "has left"};
  std::string why = std::string(kernel) + ", block " + name(at) + ": ";
  for (std::size_t t = 0; t < fibers.size(); ++t) {
    if (t > 0 && fibers[t].state == fibers[t - 1].state) continue;
    why += (t > 0 ? "; " : "") + ("thread " + std::to_string(t)) + " " +
           names[int(fibers[t].state)];
  }
  report(cudaErrorLaunchFailure, why);
}

void run_block(const char* kernel) {
  prepare();
  const std::vector<unsigned> turns = order(fibers.size());
  for (;;) {
    bool all_done = true;
    for (const unsigned t : turns) {
      if (fibers[t].state == State::ready) {
        current = &fibers[t];
        running.thread = t;
        running.kernel = current->in_kernel;
        swapcontext(&scheduler, &current->context);
        running.kernel = false;
        if (last_error != cudaSuccess) return;
      }
      all_done = all_done && fibers[t].state == State::done;
    }
    if (all_done) return;
    const bool shuffled = release_shuffles();
    if (!shuffled && !release_barrier()) return report_stuck(kernel);
  }
}

}  // namespace

uint3 thread_index() { return current->index; }
uint3 block_index() { return at; }
uint3 block_size() { return block; }
uint3 grid_size() { return grid; }
int lane_index() { return int((current - fibers.data()) % kWarp); }
void barrier() { wait(State::at_barrier); }
void enter_kernel() { running.kernel = current->in_kernel = true; }

uint64_t exchange(unsigned mask, uint64_t value, int lane) {
  current->mask = mask;
  current->value = value;
  current->lane = lane;
  wait(State::at_shuffle);
  return current->received;
}

void* shared_storage(int site, std::size_t bytes) {
  void*& storage = shared_blocks[site];
  if (!storage) {
    storage = std::malloc(bytes);
    std::memset(storage, 0xff, bytes);
    allow(storage, bytes, "shared memory", true);
  }
  return storage;
}

void fail(cudaError_t error, const std::string& why) {
  report(error, log.back().kernel + ", block " + name(at) + ", thread " + name(current->index) +
                    ": " + why);
  swapcontext(&current->context, &scheduler);
}

void run(const Configuration& c, const std::function<void()>& thread) {
  if (last_error != cudaSuccess || !stream_is_right(c.stream, c.kernel)) return;
  const std::size_t threads = std::size_t(c.block.x) * c.block.y * c.block.z;
  const bool sizes = c.grid.x && c.grid.y && c.grid.z && threads && threads <= kMaxThreads &&
                     c.grid.x <= 0x7fffffffu && c.grid.y <= kMaxGridYZ && c.grid.z <= kMaxGridYZ;
  if (!sizes || c.shared != 0) {
    return report(cudaErrorInvalidConfiguration, std::string(c.kernel) + ": grid or block size");
  }
  if (!stacks) {
    stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) throw std::bad_alloc();
  }
  log.push_back({c.kernel, c.grid, c.block});
  body = &thread;
  grid = {c.grid.x, c.grid.y, c.grid.z};
  block = {c.block.x, c.block.y, c.block.z};
  fibers.resize(threads);
  ++running.launch;
  running.stacks_begin = reinterpret_cast<std::uintptr_t>(stacks);
  running.stacks_end = running.stacks_begin + kMaxThreads * kStack;
  const std::size_t blocks = std::size_t(grid.x) * grid.y * grid.z;
  for (const unsigned b : order(blocks)) {
    at = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    running.block = b;
    running.interval = 0;
    run_block(c.kernel);
    for (const auto& [site, storage] : shared_blocks) {
      forbid(storage);
      std::free(storage);
    }
    shared_blocks.clear();
    if (last_error != cudaSuccess) break;
  }
}

void expect_stream(cudaStream_t stream) { expected_stream = stream; }
void choose_order(unsigned which) { seed = which; }

std::vector<Launched> take_log() {
  std::vector<Launched> out;
  std::swap(out, log);
  return out;
}

}  // namespace emulator

extern "C" {

// UndefinedBehaviorSanitizer calls the first for each of its reports; the second says what it is.
void __ubsan_get_current_report_data(const char** kind, const char** message, const char** file,
                                     unsigned* line, unsigned* column, char** address);
__attribute__((visibility("default"))) void __ubsan_on_report() {
  const char *kind, *message, *file;
  char* address;
  unsigned line, column;
  __ubsan_get_current_report_data(&kind, &message, &file, &line, &column, &address);
  emulator::report(cudaErrorLaunchFailure,
                   std::string(file) + ":" + std::to_string(line) + ": " + message);
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  if (!emulator::stream_is_right(stream, "cudaMemsetAsync")) return emulator::last_error;
  if (!emulator::allowed(to, bytes)) {
    emulator::report(cudaErrorInvalidValue, "cudaMemsetAsync beyond a tensor");
    return emulator::last_error;
  }
  emulator::log.push_back({"memset", {}, {}});
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorMisalignedAddress: return "cudaErrorMisalignedAddress";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    default: return "another cudaError";
  }
}

const char* cudaGetErrorString(cudaError_t) { return emulator::last_message.c_str(); }

}  // extern "C"
