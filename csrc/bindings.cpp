// The Python module fda_fast._C: tensors arrive as addresses, sizes as int64, nothing is checked
// here. Callers (fda_fast/ops/native, fda_fast/ops/cuda) have checked shapes, dtypes and strides.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

#if defined(FDA_CUDA_ARCHS)
// In bindings_cuda.cpp: the launchers of csrc/*.cu.
void bind_cuda(py::module_& m);
#endif

namespace {

using fda::Kernels;

// The tables this machine can run, the slowest first.
std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> tables{&fda::baseline::table};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&fda::avx2::table);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      tables.push_back(&fda::avx512::table);
    }
  }
#endif
  return tables;
}

const Kernels* chosen = usable().back();

void use_isa(const std::string& isa) {
  for (const Kernels* table : usable()) {
    if (table->isa == isa) {
      chosen = table;
      return;
    }
  }
  throw py::value_error("instruction set " + isa + " cannot run here");
}

py::list isas() {
  py::list names;
  for (const Kernels* table : usable()) names.append(table->isa);
  return names;
}

// A pointer crosses from Python as an integer, everything else as itself.
template <typename T>
struct Wire {
  using type = T;
  static T read(T value) { return value; }
};

template <typename T>
struct Wire<T*> {
  using type = std::uintptr_t;
  static T* read(std::uintptr_t address) { return reinterpret_cast<T*>(address); }
};

// One kernel as a function of the module, named arguments in the order of its declaration.
template <typename Result, typename... Args, typename... Names>
void def(py::module_& m, const char* name, Result (*Kernels::* kernel)(Args...), Names... names) {
  static_assert(sizeof...(Args) == sizeof...(Names), "one name for each argument");
  m.def(
      name,
      [kernel](typename Wire<Args>::type... args) {
        return (chosen->*kernel)(Wire<Args>::read(args)...);
      },
      py::arg(names)..., py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fda_fast; used through fda_fast.ops.";
  m.def("isas", &isas, "Instruction sets compiled in that this machine runs, slowest first.");
  m.def("isa", [] { return chosen->isa; }, "The instruction set in use.");
  m.def("use_isa", &use_isa, py::arg("name"), "Choose the instruction set (for tests).");

  def(m, "activation_forward", &Kernels::activation_forward, "kind", "n", "x", "dx", "y", "dy",
      "threads");
  def(m, "activation_slope", &Kernels::activation_slope, "kind", "n", "x", "dx", "v", "out",
      "threads");
  def(m, "activation_reverse", &Kernels::activation_reverse, "kind", "n", "x", "dx", "g", "t", "S",
      "b", "S_x", "b_x", "threads");

  def(m, "gated_forward", &Kernels::gated_forward, "kind", "rows", "h", "x", "dx", "y", "dy",
      "threads");
  def(m, "gated_backward", &Kernels::gated_backward, "kind", "rows", "h", "x", "dx", "g", "out",
      "threads");
  def(m, "gated_tangent", &Kernels::gated_tangent, "kind", "rows", "h", "x", "t", "out",
      "threads");
  def(m, "gated_reverse", &Kernels::gated_reverse, "kind", "rows", "h", "x", "dx", "g", "t", "S",
      "b", "S_x", "b_x", "threads");

  def(m, "norm_forward", &Kernels::norm_forward, "center", "tasks", "rows", "d", "x", "dx", "w",
      "c", "tw", "tb", "eps", "y", "dy", "threads");
  def(m, "norm_backward", &Kernels::norm_backward, "center", "tasks", "rows", "d", "x", "dx", "g",
      "w", "tw", "eps", "g_x", "G_w", "G_c", "partial", "threads");
  def(m, "norm_tangent", &Kernels::norm_tangent, "center", "tasks", "rows", "d", "x", "t", "w",
      "mw", "mb", "eps", "out", "threads");
  def(m, "norm_reverse", &Kernels::norm_reverse, "center", "tasks", "rows", "d", "x", "dx", "g",
      "t", "S", "b", "w", "tw", "mw", "eps", "S_x", "b_x", "threads");

  def(m, "similarity_forward", &Kernels::similarity_forward, "kind", "tasks", "anchors", "d", "y",
      "dy", "scale", "each", "s", "g", "threads");
  def(m, "similarity_reverse", &Kernels::similarity_reverse, "tasks", "anchors", "d", "y", "dy",
      "t", "scale", "S", "b", "threads");

  def(m, "alignment_dots", &Kernels::alignment_dots, "tasks", "rows", "o", "segments", "widths",
      "g", "u", "v", "partial", "out", "threads");
  def(m, "alignment_mix", &Kernels::alignment_mix, "tasks", "rows", "o", "segments", "widths",
      "alpha", "u", "beta", "v", "row", "out", "threads");
  def(m, "alignment_coefficients", &Kernels::alignment_coefficients, "tasks", "parameters",
      "dots", "squares", "active", "eps", "loss", "cosines", "coefficients");

  def(m, "attention_scratch", &Kernels::attention_scratch, "sizes");
  def(m, "attention_forward", &Kernels::attention_forward, "sizes", "scale", "cos", "sin", "x",
      "dx", "y", "dy", "P", "dP", "scratch", "threads");
  def(m, "attention_backward", &Kernels::attention_backward, "sizes", "scale", "cos", "sin", "x",
      "g", "P", "A", "g_x", "scratch", "threads");
  def(m, "attention_tangent", &Kernels::attention_tangent, "sizes", "scale", "cos", "sin", "x",
      "t", "P", "tS", "t_y", "scratch", "threads");
  def(m, "attention_reverse", &Kernels::attention_reverse, "sizes", "scale", "cos", "sin", "x",
      "dx", "g", "t", "S", "b", "P", "dP", "A", "tS", "S_x", "b_x", "scratch", "threads");
  def(m, "attention_adjoint", &Kernels::attention_adjoint, "sizes", "scale", "cos", "sin", "x",
      "dx", "b", "P", "dP", "b_x", "scratch", "threads");

  def(m, "adamw_step", &Kernels::adamw_step, "tasks", "n", "anchors", "grad", "exp_avg",
      "exp_avg_sq", "loss", "best_loss", "best", "beta2", "gain1", "gain2", "step_size", "root",
      "eps", "decay", "threads");
  def(m, "coefficients_update", &Kernels::coefficients_update, "tasks", "n", "alpha", "tau",
      "grad", "exp_avg", "exp_avg_sq", "delta", "beta2", "gain1", "gain2", "step_size", "root",
      "eps", "threads");

#if defined(FDA_CUDA_ARCHS)
  m.attr("CUDA_ARCHS") = FDA_CUDA_ARCHS;
  bind_cuda(m);
#else
  m.attr("CUDA_ARCHS") = "";
#endif
}
