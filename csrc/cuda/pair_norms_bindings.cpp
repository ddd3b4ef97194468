// Bindings of pair_norms on a GPU in module _cuda.
#include "bindings/pair_norms_problem.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings/parts.h"
#include "common/numbers.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace activedpo {

namespace {

template <typename T>
void bind_dtype(py::module_& module, const std::string& dtype) {
  module.def(
      ("pair_norms_" + dtype).c_str(),
      [](const PairNorms& given, int device, std::uintptr_t stream) {
        pair_norms<T>(given, {device, reinterpret_cast<cudaStream_t>(stream)});
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("given"), py::kw_only(),
      py::arg("device"), py::arg("stream"));
}

}  // namespace

void bind_pair_norms(py::module_& module) {
  bind_pair_norms_problem(module);
  bind_dtype<float>(module, "float32");
  bind_dtype<double>(module, "float64");
  bind_dtype<BFloat16>(module, "bfloat16");
  bind_dtype<Half>(module, "float16");
}

}  // namespace activedpo
