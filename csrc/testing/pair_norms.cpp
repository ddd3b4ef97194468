// The GPU's pair_norms on the CPU, for the tests: lanes one after another.
#include "cuda/pair_norms.h"

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "bindings/pair_norms_problem.h"
#include "bindings/parts.h"
#include "testing/host_numbers.h"

namespace activedpo {

namespace {

template <typename T>
void pair_norms(const PairNorms& given) {
  using Lane = LaneNorms<T, HostNumbers>;
  const auto root = [&](auto part) {
    double sum = 0;
    for (int lane = 0; lane < Lane::kLanes; ++lane) sum += part(Lane(given, lane));
    return std::sqrt(sum);
  };
  for (std::int64_t at = 0; at < 2 * given.n_pairs; ++at) {
    const std::int64_t row = given.pairs[at];
    given.row_norm[row] = root([&](const Lane& lane) { return lane.of_row(row); });
  }
  for (std::int64_t pair = 0; pair < given.n_pairs; ++pair) {
    given.pair_norm[pair] = root([&](const Lane& lane) { return lane.of_pair(pair); });
  }
}

}  // namespace

void bind_pair_norms(pybind11::module_& module) {
  const auto bind = [&](const char* dtype, auto function) {
    module.def((std::string("pair_norms_") + dtype).c_str(), function,
               "The arithmetic of activedpo_fast._cuda's function.",
               pybind11::call_guard<pybind11::gil_scoped_release>(), pybind11::arg("given"));
  };
  bind_pair_norms_problem(module);
  bind("float32", &pair_norms<float>);
  bind("float64", &pair_norms<double>);
  bind("bfloat16", &pair_norms<BFloat16>);
  bind("float16", &pair_norms<Half>);
}

}  // namespace activedpo
