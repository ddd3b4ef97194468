// Bindings of scores/: rows, norms of pairs, running scores.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings/parts.h"
#include "scores/pair_norms.h"
#include "scores/refresh_bounds.h"

namespace py = pybind11;

namespace activedpo {

namespace {

template <typename T>
const T* at(std::uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}
template <typename T>
T* to(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

RowSource row_source(std::uintptr_t base, std::int64_t stride, std::uintptr_t descriptors,
                     std::uintptr_t file_of_row, std::uintptr_t offset_of_row,
                     std::int64_t row_bytes) {
  return {at<char>(base), stride, at<std::int32_t>(descriptors), at<std::int32_t>(file_of_row),
          at<std::int64_t>(offset_of_row), row_bytes};
}

Candidates candidates(std::int64_t n, std::uintptr_t pairs, std::uintptr_t row_divisor,
                      std::uintptr_t pair_divisor, std::uintptr_t reach, std::uintptr_t left,
                      std::uintptr_t inverse_cost, std::uintptr_t score, std::uintptr_t error_bound,
                      std::uintptr_t inherited, std::uintptr_t version) {
  return {n, at<std::int64_t>(pairs), at<double>(row_divisor), at<double>(pair_divisor),
          at<double>(reach), at<std::uint8_t>(left), at<double>(inverse_cost), to<double>(score),
          to<double>(error_bound), to<double>(inherited), to<std::int32_t>(version)};
}

template <typename T>
void bind_dtype(py::module_& module, const char* dtype) {
  module.def((std::string("pair_norms_") + dtype).c_str(),
             [](std::uintptr_t row_norm, std::uintptr_t pair_norm, const RowSource& rows,
                std::int64_t k, std::uintptr_t pairs, std::int64_t n_pairs, bool by_row,
                int num_threads) {
               return pair_norms<T>(to<double>(row_norm), to<double>(pair_norm), rows, k,
                                    at<std::int64_t>(pairs), n_pairs, by_row, num_threads);
             },
             py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("row_norm"),
             py::arg("pair_norm"), py::arg("rows"), py::arg("k"), py::arg("pairs"),
             py::arg("n_pairs"), py::arg("by_row"), py::arg("num_threads"));
  module.def((std::string("refresh_bounds_") + dtype).c_str(),
             [](std::uintptr_t contenders, std::uintptr_t touched, const RowSource& rows,
                std::int64_t k, const Candidates& candidates, const Directions& directions,
                Memory& memory, int num_threads) {
               return refresh_bounds<T>(to<std::int64_t>(contenders), to<std::int64_t>(touched),
                                        rows, k, candidates, directions, &memory, num_threads);
             },
             py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("contenders"),
             py::arg("touched"), py::arg("rows"), py::arg("k"), py::arg("candidates"),
             py::arg("directions"), py::arg("memory"), py::arg("num_threads"));
}

}  // namespace

void bind_scores(py::module_& module) {
  py::class_<RowSource>(module, "RowSource")
      .def(py::init(&row_source), py::kw_only(), py::arg("base"), py::arg("stride"),
           py::arg("descriptors"), py::arg("file_of_row"), py::arg("offset_of_row"),
           py::arg("row_bytes"));
  py::class_<Candidates>(module, "Candidates")
      .def(py::init(&candidates), py::kw_only(), py::arg("n"), py::arg("pairs"),
           py::arg("row_divisor"), py::arg("pair_divisor"), py::arg("reach"), py::arg("left"),
           py::arg("inverse_cost"), py::arg("score"), py::arg("error_bound"), py::arg("inherited"),
           py::arg("version"));
  py::class_<Directions>(module, "Directions")
      .def(py::init([](std::uintptr_t unit, std::int64_t stride, std::uintptr_t norm,
                       std::uintptr_t error, std::uintptr_t turn, std::int64_t count) {
             return Directions{at<char>(unit), stride, at<double>(norm), at<double>(error),
                               at<double>(turn), count};
           }),
           py::kw_only(), py::arg("unit"), py::arg("stride"), py::arg("norm"), py::arg("error"),
           py::arg("turn"), py::arg("count"))
      .def_readwrite("count", &Directions::count);
  py::class_<Memory>(module, "Memory")
      .def(py::init([](std::uintptr_t products, std::int64_t capacity, std::uintptr_t row_version,
                       std::uintptr_t place, double margin, std::int64_t block) {
             return Memory{to<char>(products), capacity, to<std::int32_t>(row_version),
                           to<std::int32_t>(place), margin, block};
           }),
           py::kw_only(), py::arg("products"), py::arg("capacity"), py::arg("row_version"),
           py::arg("place"), py::arg("margin"), py::arg("block"));
  bind_dtype<float>(module, "float32");
  bind_dtype<double>(module, "float64");
  bind_dtype<BFloat16>(module, "bfloat16");
  bind_dtype<Half>(module, "float16");
}

}  // namespace activedpo
