"""Tensor operations, one function each, registered with PyTorch as torch.ops.activedpo.

Each function checks its arguments and calls the backend that `backends.choose` returns, no more.
The selection's operations on whole candidate sets are in `scores`. As registered operations, they
go through torch.compile without graph breaks (even with `fullgraph`), and FakeTensors know their
shapes; `outer_sketches_`, which is `outer_sketch_` of many weights, is not registered.

Captured gradients are never formed: `outer_sketches_` takes them as outer products, and
`one_hot_sketch_` takes those of embeddings by place. `sjlt_` and `rademacher_` give gradients that
are formed already the same sketch; docs/benchmarks.md compares them with the projections of other
packages.
"""

from activedpo_fast.ops.logps import response_logp_grad, response_logps
from activedpo_fast.ops.one_hot import OneHotSum, one_hot_sketch_
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
    "OneHotSum",
    "OuterSum",
    "one_hot_sketch_",
    "outer_sketch_",
    "outer_sketches_",
    "rademacher_",
    "rank_update_",
    "response_logp_grad",
    "response_logps",
    "sjlt_",
]
