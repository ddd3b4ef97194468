// Bindings of sketch/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "bindings/parts.h"
#include "sketch/outer.h"
#include "sketch/rademacher.h"
#include "sketch/sjlt.h"

namespace py = pybind11;

namespace activedpo {

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

template <typename T>
void bind_outer(py::module_& module, const char* method, const char* dtype,
                void (OuterSketch<T>::*sketch)() const) {
  const std::string name = std::string("outer_") + method + "_" + dtype;
  module.def(
      name.c_str(),
      [sketch](std::uintptr_t out, std::int64_t out_stride, std::uintptr_t left,
               std::int64_t left_stride, std::uintptr_t right, std::int64_t right_stride,
               std::uintptr_t segments, std::int64_t n_segments, std::int64_t rows,
               std::int64_t columns, std::int64_t k, std::uint64_t key,
               std::array<std::int64_t, 2> sides, std::array<std::int64_t, 2> place,
               int num_threads) {
        const OuterSketch<T> outer{
            reinterpret_cast<double*>(out), out_stride,
            reinterpret_cast<const T*>(left), left_stride,
            reinterpret_cast<const T*>(right), right_stride,
            reinterpret_cast<const Segment*>(segments), n_segments,
            rows, columns, k, key, {sides[0], sides[1]}, place[0], place[1],
            num_threads};
        const py::gil_scoped_release released;
        (outer.*sketch)();
      },
      py::kw_only(), py::arg("out"), py::arg("out_stride"), py::arg("left"),
      py::arg("left_stride"), py::arg("right"), py::arg("right_stride"), py::arg("segments"),
      py::arg("n_segments"), py::arg("rows"), py::arg("columns"), py::arg("k"), py::arg("key"),
      py::arg("sides"), py::arg("place"), py::arg("num_threads"));
}

template <typename T>
void bind_outer_sketches(py::module_& module, const char* dtype) {
  bind_outer<T>(module, "sjlt", dtype, &OuterSketch<T>::sjlt);
  bind_outer<T>(module, "rademacher", dtype, &OuterSketch<T>::rademacher);
  bind_outer<T>(module, "kronecker", dtype, &OuterSketch<T>::kronecker);
}

}  // namespace

void bind_sketches(py::module_& module) {
  bind<float>(module, "sjlt_float32", sjlt<float>);
  bind<double>(module, "sjlt_float64", sjlt<double>);
  bind<float>(module, "rademacher_float32", rademacher<float>);
  bind<double>(module, "rademacher_float64", rademacher<double>);
  bind_outer_sketches<float>(module, "float32");
  bind_outer_sketches<double>(module, "float64");
  bind_outer_sketches<BFloat16>(module, "bfloat16");
}

}  // namespace activedpo
