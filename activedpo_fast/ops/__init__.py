"""Tensor operations, one function each, registered with PyTorch as torch.ops.activedpo.

Each function checks its arguments and calls the backend that `backends.choose` returns, no more.
The selection's operations on whole candidate sets are in `scores`. As registered operations, they
go through torch.compile without graph breaks (even with `fullgraph`), and FakeTensors know their
shapes; `outer_sketches_`, which is `outer_sketch_` of many weights, is not registered.

The package never holds a whole gradient, so it does not call `sjlt_` and `rademacher_` itself.
They give gradients from elsewhere the sketch that `outer_sketch_` would give them, and
docs/benchmarks.md compares them with the projections of other packages.
"""

from activedpo_fast.ops.logps import response_logp_grad, response_logps
from activedpo_fast.ops.rank_update import rank_update_
from activedpo_fast.ops.sketch import (
    METHODS,
    OuterSum,
    outer_sketch_,
    outer_sketches_,
    rademacher_,
    sjlt_,
)

__all__ = [
    "METHODS",
    "OuterSum",
    "outer_sketch_",
    "outer_sketches_",
    "rademacher_",
    "rank_update_",
    "response_logp_grad",
    "response_logps",
    "sjlt_",
]
