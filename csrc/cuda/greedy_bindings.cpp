// Bindings of the greedy selection on a GPU in module _cuda.
#include "bindings/greedy_problem.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings/parts.h"
#include "cuda/greedy.h"

namespace py = pybind11;

namespace activedpo {

namespace {

template <typename T>
void bind_dtype(py::module_& module, const std::string& dtype) {
  bind_greedy_bytes<T>(module, ("greedy_bytes_" + dtype).c_str());
  module.def(
      ("greedy_select_" + dtype).c_str(),
      [](const GreedyProblem& problem, std::uintptr_t room, std::int64_t begin, std::int64_t end,
         int device, std::uintptr_t stream) {
        greedy_select<T>(problem, reinterpret_cast<char*>(room), begin, end,
                         {device, reinterpret_cast<cudaStream_t>(stream)});
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("problem"), py::kw_only(), py::arg("room"),
      py::arg("begin"), py::arg("end"), py::arg("device"), py::arg("stream"));
}

}  // namespace

void bind_greedy(py::module_& module) {
  bind_greedy_problem(module);
  bind_dtype<float>(module, "float32");
  bind_dtype<double>(module, "float64");
  bind_dtype<BFloat16>(module, "bfloat16");
  bind_dtype<Half>(module, "float16");
}

}  // namespace activedpo
