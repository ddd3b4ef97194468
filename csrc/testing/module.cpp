// The module _testing: the GPU's arithmetic on the CPU and the random bits, for the tests. Wheels do
// not have it.
#include <pybind11/pybind11.h>

#include "bindings/parts.h"

PYBIND11_MODULE(_testing, module) {
  module.doc() = "What the tests alone call: the GPU's arithmetic on the CPU, slowly.";
  activedpo::bind_philox(module);
  activedpo::bind_rank_update(module);
  activedpo::bind_pair_norms(module);
  activedpo::bind_greedy(module);
}
