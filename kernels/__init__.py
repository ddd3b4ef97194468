"""The GPU kernels in Triton, installed as `activedpo_fast.kernels`.

    philox                 random bits, made in registers
    hashes                 buckets and signs of positions, drawn once a call
    launching              what the host functions have in common
    fixed_point            sums that are the same in any order of additions
    lora_grad_sketch       gradients tile by tile into their sparse sketch or Kronecker sketch
    lora_grad_rademacher   gradients tile by tile into their dense sign projection
    response_logp_grad     log-probabilities of responses and their gradient at the LM head
    variants               what is compiled ahead of time

`activedpo_fast.ops` calls them for tensors on a GPU. Each module imports Triton; this one does not,
and says whether they can be imported.
"""

from __future__ import annotations

import os
from importlib.util import find_spec


def why_not() -> str:
    """Why the kernels cannot be used here, in one sentence; empty where they can."""
    if find_spec("triton") is None:
        return ("Triton is not installed; torch's CUDA builds for Linux bring it, and so does "
                "pip install activedpo-fast[gpu]")
    return ""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as the tests do."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
