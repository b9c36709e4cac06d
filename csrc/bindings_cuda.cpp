// The CUDA launchers as functions of fda_fast._C. Tensors and the stream arrive as addresses; a
// launch that fails raises RuntimeError with the kernel's name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "launchers.cuh"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Widths = std::vector<int64_t>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address address) { return reinterpret_cast<cudaStream_t>(address); }

void check(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

// (address, stride between tasks, stride between segments)
using Strided = std::tuple<Address, int64_t, int64_t>;

fda::cuda::Coefficients coefficients_of(const Strided& c) {
  return {at<const float>(std::get<0>(c)), std::get<1>(c), std::get<2>(c)};
}

// (beta2, 1 - beta1, 1 - beta2, eps, step size, root, device step, lr, log beta1, log beta2)
using AdamTuple =
    std::tuple<float, float, float, float, float, float, Address, float, float, float>;

fda::cuda::AdamArguments adam_of(const AdamTuple& a) {
  return {std::get<0>(a), std::get<1>(a), std::get<2>(a), std::get<3>(a), std::get<4>(a),
          std::get<5>(a), at<const int64_t>(std::get<6>(a)), std::get<7>(a), std::get<8>(a),
          std::get<9>(a)};
}

// (g, u or none, v or none, offset, rows, width, stride of rows, of tasks of g, of u, of v, parameter)
using Optional = std::optional<Address>;
using TermTuple = std::tuple<Address, Optional, Optional, int64_t, int64_t, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int64_t>;

std::vector<fda::cuda::Term> terms_of(const std::vector<TermTuple>& tuples) {
  std::vector<fda::cuda::Term> out;
  for (const auto& [g, u, v, offset, rows, width, row, task_g, task_u, task_v, p] : tuples) {
    out.push_back({at<const void>(g), at<const void>(u.value_or(0)), at<const void>(v.value_or(0)),
                   u.has_value(), v.has_value(), offset, rows, width, row, task_g, task_u, task_v,
                   p});
  }
  return out;
}

void dots(int dtype, int64_t tasks, int64_t parameters, const std::vector<TermTuple>& tuples,
          Address partial, int64_t chunks, Address dots, Address stream) {
  const auto terms = terms_of(tuples);
  check("alignment_dots",
        fda::cuda::alignment_dots(dtype, tasks, parameters, terms.size(), terms.data(),
                                  at<float>(partial), chunks, at<float>(dots), stream_of(stream)));
}

void evaluate(int dtype, int64_t tasks, int64_t parameters, const std::vector<TermTuple>& tuples,
              Address partial, int64_t chunks, Address dots, Address squares, Address active,
              float eps, Address loss, Address cosines, Address out, Address stream) {
  const auto terms = terms_of(tuples);
  check("alignment_evaluate",
        fda::cuda::alignment_evaluate(
            dtype, tasks, parameters, terms.size(), terms.data(), at<float>(partial), chunks,
            at<float>(dots), at<const float>(squares), at<const bool>(active), eps,
            at<float>(loss), at<float>(cosines), at<float>(out), stream_of(stream)));
}

void mix(int dtype, int64_t tasks, int64_t rows, int64_t o, const Widths& widths,
         const Strided& alpha, Address u, const Strided& beta, Address v, Address row, Address out,
         Address stream) {
  check("alignment_mix",
        fda::cuda::alignment_mix(dtype, tasks, rows, o, widths.size(), widths.data(),
                                 coefficients_of(alpha), at<const void>(u), coefficients_of(beta),
                                 at<const void>(v), at<const void>(row), at<void>(out),
                                 stream_of(stream)));
}

void coefficients(int64_t tasks, int64_t parameters, Address dots, Address squares, Address active,
                  float eps, Address loss, Address cosines, Address out, Address stream) {
  check("alignment_coefficients",
        fda::cuda::alignment_coefficients(
            tasks, parameters, at<const float>(dots), at<const float>(squares),
            at<const bool>(active), eps, at<float>(loss), at<float>(cosines), at<float>(out),
            stream_of(stream)));
}

void adamw(int64_t tasks, int64_t n, Address anchors, Address grad, Address exp_avg,
           Address exp_avg_sq, Address loss, Address best_loss, Address best,
           const AdamTuple& adam, float decay, int64_t step, Address history, int64_t capacity,
           Address stream) {
  check("adamw_step",
        fda::cuda::adamw_step(tasks, n, at<float>(anchors), at<const float>(grad),
                              at<float>(exp_avg), at<float>(exp_avg_sq), at<const float>(loss),
                              at<float>(best_loss), at<float>(best), adam_of(adam), decay, step,
                              at<float>(history), capacity, stream_of(stream)));
}

void update(int64_t tasks, int64_t n, Address alpha, Address tau, Address grad, Address exp_avg,
            Address exp_avg_sq, Address delta, const AdamTuple& adam, Address stream) {
  check("coefficients_update",
        fda::cuda::coefficients_update(tasks, n, at<float>(alpha), at<const float>(tau),
                                       at<const float>(grad), at<float>(exp_avg),
                                       at<float>(exp_avg_sq), at<float>(delta), adam_of(adam),
                                       stream_of(stream)));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_alignment_dots", &dots, py::arg("dtype"), py::arg("tasks"), py::arg("parameters"),
        py::arg("terms"), py::arg("partial"), py::arg("chunks"), py::arg("dots"),
        py::arg("stream"));
  m.def("cuda_alignment_evaluate", &evaluate, py::arg("dtype"), py::arg("tasks"),
        py::arg("parameters"), py::arg("terms"), py::arg("partial"), py::arg("chunks"),
        py::arg("dots"), py::arg("squares"), py::arg("active"), py::arg("eps"), py::arg("loss"),
        py::arg("cosines"), py::arg("out"), py::arg("stream"));
  m.def("cuda_alignment_mix", &mix, py::arg("dtype"), py::arg("tasks"), py::arg("rows"),
        py::arg("o"), py::arg("widths"), py::arg("alpha"), py::arg("u"), py::arg("beta"),
        py::arg("v"), py::arg("row"), py::arg("out"), py::arg("stream"));
  m.def("cuda_alignment_coefficients", &coefficients, py::arg("tasks"), py::arg("parameters"),
        py::arg("dots"), py::arg("squares"), py::arg("active"), py::arg("eps"), py::arg("loss"),
        py::arg("cosines"), py::arg("out"), py::arg("stream"));
  m.def("cuda_adamw_step", &adamw, py::arg("tasks"), py::arg("n"), py::arg("anchors"),
        py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("loss"),
        py::arg("best_loss"), py::arg("best"), py::arg("adam"), py::arg("decay"), py::arg("step"),
        py::arg("history"), py::arg("capacity"), py::arg("stream"));
  m.def("cuda_coefficients_update", &update, py::arg("tasks"), py::arg("n"), py::arg("alpha"),
        py::arg("tau"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
        py::arg("delta"), py::arg("adam"), py::arg("stream"));
}
