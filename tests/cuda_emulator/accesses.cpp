// Every load and store of a kernel: within the tensors of the call, aligned, in no race.
//
// The compiler's -fsanitize=thread puts a call of one of the functions at the end before each of
// them. A race is two accesses of one byte in one launch, one of them a write, by threads that no
// barrier orders. It is found whatever the order in which the threads ran.
#include <cuda_runtime.h>

#include <iterator>
#include <map>
#include <vector>

#include "memory.h"

namespace emulator {
namespace {

constexpr uint32_t kNobody = 0xffffffffu, kSeveral = 0xfffffffeu;
// An access this many bytes off a tensor is described from it.
constexpr std::uintptr_t kNear = 4096;

// Who touched one byte: blocks of the launch, and threads of one interval of the last block.
struct Trace {
  uint32_t launch;
  uint32_t writing_block, reading_block;
  uint32_t block, interval;
  uint32_t writer, reader;
  bool written;  // in any launch
};

struct Area {
  std::uintptr_t end;
  std::string name;
  bool fresh;
  std::vector<Trace> traces;
};

std::map<std::uintptr_t, Area> areas;  // by their begin
std::uintptr_t latest_begin = 1, latest_end = 0;
Area* latest = nullptr;

// The area that holds all of [begin, begin + bytes), or null.
Area* find(std::uintptr_t begin, std::size_t bytes) {
  if (begin >= latest_begin && begin + bytes <= latest_end) return latest;
  for (auto next = areas.upper_bound(begin); next != areas.begin();) {
    --next;
    if (begin + bytes <= next->second.end) {
      latest_begin = next->first;
      latest_end = next->second.end;
      latest = &next->second;
      return latest;
    }
  }
  return nullptr;
}

void forget_latest() {
  latest_begin = 1;
  latest_end = 0;
}

std::string describe(std::uintptr_t address, std::size_t bytes, bool write) {
  const std::string what = (write ? "writes " : "reads ") + std::to_string(bytes) + " bytes";
  const auto next = areas.upper_bound(address);
  if (next != areas.begin()) {
    const auto& [begin, area] = *std::prev(next);
    if (address < area.end + kNear) {
      return what + " at " + std::to_string(address - begin) + " of " + area.name +
             ", which has " + std::to_string(area.end - begin);
    }
  }
  if (next != areas.end() && next->first - address < kNear) {
    return what + " at -" + std::to_string(next->first - address) + " of " + next->second.name;
  }
  return what + " far from every tensor of the call";
}

// Records the access; whether it races with an earlier one.
bool races(Trace& t, bool write) {
  const Running& me = running;
  if (t.launch != me.launch) {
    t.launch = me.launch;
    t.writing_block = t.reading_block = t.block = kNobody;
  }
  const auto others = [](uint32_t who, uint32_t self) { return who != kNobody && who != self; };
  bool found = others(t.writing_block, me.block) || (write && others(t.reading_block, me.block));
  if (t.block != me.block || t.interval != me.interval) {
    t.block = me.block;
    t.interval = me.interval;
    t.writer = t.reader = kNobody;
  }
  found = found || others(t.writer, me.thread) || (write && others(t.reader, me.thread));
  const auto add = [](uint32_t& who, uint32_t self) {
    who = who == kNobody || who == self ? self : kSeveral;
  };
  add(write ? t.writing_block : t.reading_block, me.block);
  add(write ? t.writer : t.reader, me.thread);
  t.written = t.written || write;
  return found;
}

void touch(const void* where, std::size_t bytes, bool write, bool aligned) {
  if (!running.kernel) return;
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(where);
  if (address >= running.stacks_begin && address < running.stacks_end) return;
  Area* area = find(address, bytes);
  if (!area) return fail(cudaErrorIllegalAddress, describe(address, bytes, write));
  if (aligned && address % bytes != 0) {
    return fail(cudaErrorMisalignedAddress, describe(address, bytes, write));
  }
  const std::uintptr_t begin = area->end - area->traces.size();
  for (std::size_t i = 0; i < bytes; ++i) {
    Trace& trace = area->traces[address - begin + i];
    if (area->fresh && !write && !trace.written) {
      return fail(cudaErrorLaunchFailure,
                  describe(address, bytes, write) + ", which nobody has written");
    }
    if (races(trace, write)) {
      return fail(cudaErrorLaunchFailure,
                  describe(address, bytes, write) + ", in a race with another thread");
    }
  }
}

}  // namespace

void allow(const void* begin, std::size_t bytes, std::string name, bool fresh) {
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(begin);
  Area& area = areas[address];
  if (bytes > area.traces.size()) {
    area = {address + bytes, std::move(name), fresh, std::vector<Trace>(bytes)};
  }
  forget_latest();
}

void forbid(const void* begin) {
  areas.erase(reinterpret_cast<std::uintptr_t>(begin));
  forget_latest();
}

void forbid_all() {
  areas.clear();
  forget_latest();
}

bool allowed(const void* begin, std::size_t bytes) {
  return find(reinterpret_cast<std::uintptr_t>(begin), bytes) != nullptr;
}

}  // namespace emulator

#define ACCESS(bytes)                                                                      \
  void __tsan_read##bytes(void* p) { ::emulator::touch(p, bytes, false, true); }           \
  void __tsan_write##bytes(void* p) { ::emulator::touch(p, bytes, true, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { ::emulator::touch(p, bytes, false, false); } \
  void __tsan_unaligned_write##bytes(void* p) { ::emulator::touch(p, bytes, true, false); }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, std::size_t bytes) { ::emulator::touch(p, bytes, false, false); }
void __tsan_write_range(void* p, std::size_t bytes) { ::emulator::touch(p, bytes, true, false); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
