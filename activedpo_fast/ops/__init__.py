"""One function per operation on tensors, registered with PyTorch as torch.ops.activedpo.

Each checks its arguments, takes the backend that `backends.choose` names, and adds nothing to it.
The selection's operations on whole candidate sets are in `scores`. As registered operations they
go through torch.compile unbroken (under `fullgraph`, too), and FakeTensors know their shapes.
"""

from activedpo_fast.ops.logps import response_logp_grad, response_logps
from activedpo_fast.ops.rank_update import rank_update_
from activedpo_fast.ops.sketch import METHODS, outer_sketch_, rademacher_, sjlt_

__all__ = ["METHODS", "outer_sketch_", "rademacher_", "rank_update_", "response_logp_grad",
           "response_logps", "sjlt_"]
