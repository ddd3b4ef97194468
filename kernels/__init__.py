"""The GPU kernels in Triton, installed as `activedpo_fast.kernels`.

    philox                 random bits, generated in registers
    hashes                 buckets and signs of positions, drawn once per call
    launching              helpers shared by the host functions
    interpreting           Triton's interpreter with a NumPy that it was not made for
    jobs                   the table of weights that a launch works through
    fixed_point            sums that are the same in any order of additions
    gradient_bounds        their bounds, from norms of tokens
    lora_grad_sketch       sparse or Kronecker sketches of gradients, tile by tile
    sjlt_rows              sparse sketches of existing rows
    lora_grad_rademacher   dense sign projections of gradients, slab by slab
    slabs                  how that is cut into slabs of a gradient
    response_logp_grad     log-probs of responses and their gradient at the LM head
    variants               the kernel variants to compile ahead of time

`activedpo_fast.ops` calls them for tensors on a GPU. Each module imports Triton. This one does not;
it reports whether they can be imported.
"""

from __future__ import annotations

import os
from importlib.util import find_spec


def why_not() -> str:
    """Return why the kernels cannot be used here, in one sentence; empty if they can."""
    if find_spec("triton") is None:
        return ("Triton is not installed; torch's CUDA builds for Linux bring it, and so does "
                "pip install activedpo-fast[gpu]")
    return ""


def interpreted() -> bool:
    """Return whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as in the tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
