// A block of Philox, for its published known answers.
#include "common/philox.h"

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/parts.h"

namespace py = pybind11;

namespace activedpo {

void bind_philox(py::module_& module) {
  module.def(
      "philox4x32",
      [](std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
         std::uint64_t key) {
        std::uint32_t words[4][1] = {{c0}, {c1}, {c2}, {c3}};
        philox4x32<1>(words, key);
        return py::make_tuple(words[0][0], words[1][0], words[2][0], words[3][0]);
      },
      "The four words of one Philox4x32-10 block.", py::arg("c0"), py::arg("c1"), py::arg("c2"),
      py::arg("c3"), py::arg("key"));
}

}  // namespace activedpo
