// The parts of the extension module that have a file of bindings of their own.
#pragma once

#include <pybind11/pybind11.h>

namespace activedpo {

void bind_selection(pybind11::module_& module);  // selection.cpp

}  // namespace activedpo
