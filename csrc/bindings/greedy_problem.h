// Bindings of a greedy selection in _cuda and _testing: its problem, as addresses and numbers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "greedy/problem.h"

namespace activedpo {

inline void bind_greedy_problem(pybind11::module_& module) {
  namespace py = pybind11;
  using Address = std::uintptr_t;
  // Local, because both have it.
  py::class_<GreedyProblem>(module, "GreedyProblem", py::module_local())
      .def(py::init([](std::int64_t n_candidates, std::int64_t dim, Address rows,
                       std::int64_t row_stride, Address pairs, Address row_divisor,
                       Address pair_divisor, Address reach, Address size, Address score,
                       Address error_bound, Address left, Address inverse_cost, Address prompt,
                       Address prompt_room, Address group, Address group_room, double min_score,
                       Address forced, std::int64_t n_forced, double root_norm,
                       double root_error, Address base, Address directions, Address pulled,
                       std::int64_t n_before, bool rounds, std::int64_t n_picks, Address picks,
                       Address scores, Address touched, Address count) {
             GreedyProblem p{};
             p.n_candidates = n_candidates;
             p.dim = dim;
             p.rows = reinterpret_cast<const void*>(rows);
             p.row_stride = row_stride;
             p.pairs = reinterpret_cast<const std::int64_t*>(pairs);
             p.row_divisor = reinterpret_cast<const double*>(row_divisor);
             p.pair_divisor = reinterpret_cast<const double*>(pair_divisor);
             p.reach = reinterpret_cast<const double*>(reach);
             p.size = reinterpret_cast<const double*>(size);
             p.score = reinterpret_cast<double*>(score);
             p.error_bound = reinterpret_cast<double*>(error_bound);
             p.left = reinterpret_cast<std::uint8_t*>(left);
             p.inverse_cost = reinterpret_cast<const double*>(inverse_cost);
             p.prompt = reinterpret_cast<const std::int32_t*>(prompt);
             p.prompt_room = reinterpret_cast<std::int32_t*>(prompt_room);
             p.group = reinterpret_cast<const std::int32_t*>(group);
             p.group_room = reinterpret_cast<std::int32_t*>(group_room);
             p.min_score = min_score;
             p.forced = reinterpret_cast<const std::int64_t*>(forced);
             p.n_forced = n_forced;
             p.root_norm = root_norm;
             p.root_error = root_error;
             p.base = reinterpret_cast<const double*>(base);
             p.directions = reinterpret_cast<double*>(directions);
             p.pulled = reinterpret_cast<double*>(pulled);
             p.n_before = n_before;
             p.rounds = rounds;
             p.n_picks = n_picks;
             p.picks = reinterpret_cast<std::int64_t*>(picks);
             p.scores = reinterpret_cast<double*>(scores);
             p.touched = reinterpret_cast<std::int64_t*>(touched);
             p.count = reinterpret_cast<std::int64_t*>(count);
             return p;
           }),
           py::kw_only(), py::arg("n_candidates"), py::arg("dim"), py::arg("rows"),
           py::arg("row_stride"), py::arg("pairs"), py::arg("row_divisor"),
           py::arg("pair_divisor"), py::arg("reach"), py::arg("size"), py::arg("score"),
           py::arg("error_bound"), py::arg("left"), py::arg("inverse_cost"), py::arg("prompt"),
           py::arg("prompt_room"), py::arg("group"), py::arg("group_room"), py::arg("min_score"),
           py::arg("forced"), py::arg("n_forced"), py::arg("root_norm"), py::arg("root_error"),
           py::arg("base"), py::arg("directions"), py::arg("pulled"), py::arg("n_before"),
           py::arg("rounds"), py::arg("n_picks"), py::arg("picks"), py::arg("scores"),
           py::arg("touched"), py::arg("count"));
}

// greedy_bytes_<dtype>(problem): size of the selection's workspace in bytes.
template <typename T>
void bind_greedy_bytes(pybind11::module_& module, const char* name) {
  module.def(
      name,
      [](const GreedyProblem& problem) {
        GreedyRoom<typename Sum<T>::Type> room{};
        return room.lay_out(problem, nullptr);
      },
      pybind11::arg("problem"));
}

}  // namespace activedpo
