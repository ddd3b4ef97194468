// Bindings of PairNorms in _cuda and _testing, as addresses and numbers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cuda/pair_norms.h"

namespace activedpo {

inline void bind_pair_norms_problem(pybind11::module_& module) {
  namespace py = pybind11;
  using Address = std::uintptr_t;
  // Local, because both have it.
  py::class_<PairNorms>(module, "PairNorms", py::module_local())
      .def(py::init([](Address rows, std::int64_t row_stride, std::int64_t k, Address pairs,
                       std::int64_t n_pairs, bool by_row, Address row_norm, Address pair_norm) {
             return PairNorms{reinterpret_cast<const void*>(rows), row_stride, k,
                                reinterpret_cast<const std::int64_t*>(pairs), n_pairs, by_row,
                                reinterpret_cast<double*>(row_norm),
                                reinterpret_cast<double*>(pair_norm)};
           }),
           py::kw_only(), py::arg("rows"), py::arg("row_stride"), py::arg("k"), py::arg("pairs"),
           py::arg("n_pairs"), py::arg("by_row"), py::arg("row_norm"), py::arg("pair_norm"));
}

}  // namespace activedpo
