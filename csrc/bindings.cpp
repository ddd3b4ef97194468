// Python bindings over raw addresses: no libtorch, so one build serves every torch. The caller
// (activedpo_fast/ops.py) has checked shapes, dtypes and strides, and keeps the tensors alive.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "philox.h"
#include "rademacher.h"
#include "sjlt.h"

namespace py = pybind11;

namespace {

template <typename T>
using Sketch = void (*)(T*, std::int64_t, const T*, std::int64_t, std::int64_t, std::int64_t,
                        std::int64_t, std::uint64_t, int);

template <typename T>
void bind(py::module_& module, const char* name, Sketch<T> sketch) {
  module.def(
      name,
      [sketch](std::uintptr_t out, std::int64_t out_stride, std::uintptr_t x, std::int64_t x_stride,
               std::int64_t n, std::int64_t length, std::int64_t k, std::uint64_t key,
               int num_threads) {
        sketch(reinterpret_cast<T*>(out), out_stride, reinterpret_cast<const T*>(x), x_stride, n,
               length, k, key, num_threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("out"),
      py::arg("out_stride"), py::arg("x"), py::arg("x_stride"), py::arg("n"), py::arg("length"),
      py::arg("k"), py::arg("key"), py::arg("num_threads"));
}

std::array<std::uint32_t, 4> philox_block(std::array<std::uint32_t, 4> counter, std::uint64_t key) {
  std::uint32_t words[4][1] = {{counter[0]}, {counter[1]}, {counter[2]}, {counter[3]}};
  activedpo::philox4x32<1>(words, key);
  return {words[0][0], words[1][0], words[2][0], words[3][0]};
}

}  // namespace

PYBIND11_MODULE(_csrc, module) {
  module.doc() = "Sketches of per-sample gradients on the CPU; called through activedpo_fast.ops.";
  bind<float>(module, "sjlt_float32", activedpo::sjlt<float>);
  bind<double>(module, "sjlt_float64", activedpo::sjlt<double>);
  bind<float>(module, "rademacher_float32", activedpo::rademacher<float>);
  bind<double>(module, "rademacher_float64", activedpo::rademacher<double>);
  module.def(
      "philox4x32",
      [](std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
         std::uint64_t key) {
        const auto words = philox_block({c0, c1, c2, c3}, key);
        return py::make_tuple(words[0], words[1], words[2], words[3]);
      },
      "The four words of one Philox4x32-10 block.");
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
}
