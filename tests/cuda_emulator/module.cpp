// The launchers, through the project's own bindings, and what the tests set and read.
#include "memory.h"
#include "scheduler.h"

#include "bindings_cuda.cpp"

PYBIND11_MODULE(emulated, m) {
  bind_cuda(m);
  m.def("allow", [](Address begin, std::size_t bytes, const std::string& name) {
    emulator::allow(at<const void>(begin), bytes, name);
  });
  m.def("forbid_all", &emulator::forbid_all);
  m.def("expect_stream", [](Address s) { emulator::expect_stream(stream_of(s)); });
  m.def("choose_order", &emulator::choose_order);
  m.def("take_log", [] {
    std::vector<std::tuple<std::string, unsigned, unsigned, unsigned>> out;
    for (const auto& one : emulator::take_log()) {
      out.emplace_back(one.kernel, one.grid.x, one.grid.y, one.grid.z);
    }
    return out;
  });
}
