// The parts of the extension modules whose bindings are in files of their own. A part that two
// modules have is defined in each of them, for its processor.
#pragma once

#include <pybind11/pybind11.h>

namespace activedpo {

// _csrc
void bind_sketches(pybind11::module_& module);  // bindings/sketches.cpp
void bind_scores(pybind11::module_& module);    // bindings/scores.cpp

// _testing
void bind_philox(pybind11::module_& module);       // testing/philox.cpp
void bind_rank_update(pybind11::module_& module);  // testing/rank_update.cpp

// _cuda and _testing
void bind_pair_norms(pybind11::module_& module);  // cuda/pair_norms_bindings.cpp, testing/pair_norms.cpp
void bind_greedy(pybind11::module_& module);      // cuda/greedy_bindings.cpp, testing/greedy.cpp

}  // namespace activedpo
