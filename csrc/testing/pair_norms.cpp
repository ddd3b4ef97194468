// The GPU's pair_lengths on the CPU, for the tests: lanes one after another.
#include "pair_lengths.h"

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "bindings.h"
#include "host_numbers.h"
#include "pair_lengths_bindings.h"

namespace activedpo {

namespace {

template <typename T>
void pair_lengths(const PairLengths& given) {
  using Lane = LaneLengths<T, HostNumbers>;
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
    given.pair_length[pair] = root([&](const Lane& lane) { return lane.of_pair(pair); });
  }
}

}  // namespace

void bind_pair_lengths(pybind11::module_& module) {
  const auto bind = [&](const char* dtype, auto function) {
    module.def((std::string("pair_lengths_") + dtype).c_str(), function,
               "The arithmetic of activedpo_fast._cuda's function; slow, for tests.",
               pybind11::call_guard<pybind11::gil_scoped_release>());
  };
  bind_pair_lengths_problem(module);
  bind("float32", &pair_lengths<float>);
  bind("float64", &pair_lengths<double>);
  bind("bfloat16", &pair_lengths<BFloat16>);
  bind("float16", &pair_lengths<Half>);
}

}  // namespace activedpo
