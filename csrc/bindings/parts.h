// The parts of the extension module whose bindings are in separate files.
#pragma once

#include <pybind11/pybind11.h>

namespace activedpo {

void bind_selection(pybind11::module_& module);  // selection.cpp
void bind_rank_update(pybind11::module_& module);  // rank_update.cpp
void bind_pair_lengths(pybind11::module_& module);  // pair_lengths.cpp
void bind_greedy(pybind11::module_& module);  // greedy_host.cpp

}  // namespace activedpo
