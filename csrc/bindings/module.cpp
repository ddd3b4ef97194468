// The module _csrc. Its functions take raw addresses: no libtorch, so one build serves every torch.
// The caller (activedpo_fast/ops) has checked shapes, dtypes and strides, and keeps the tensors
// alive.
#include <pybind11/pybind11.h>

#include "bindings/parts.h"

PYBIND11_MODULE(_csrc, module) {
  module.doc() = "Sketches and selection on the CPU; called through activedpo_fast.ops.";
  activedpo::bind_sketches(module);
  activedpo::bind_scores(module);
}
