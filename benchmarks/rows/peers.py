"""The alternatives for sketched gradients of log π(y|x), one row per response.

Every peer is the package from PyPI, set up as its documentation says. They differ in how the
gradient of a response is computed, and in how it is projected:

* gradients: one backward pass per response; `torch.func`; Opacus' hooks; the hooks of bergson and
  of dattri, which project each module's gradient by itself and never hold a whole one;
* projections of whole gradients: TRAK, dattri, bergson, and a CountSketch in plain torch.

Not included, and why: TRAK's and dattri's CUDA projectors, dattri's "sjlt" and "grass" (its CPU
projector refuses them) and its FactGraSS (which falls back to a dense projection without CUDA).

Only LoRA parameters are trained, and they are taken in the order of `model.named_parameters()`.
Models are passed in eval mode and left as they were found: peers that need hooks or flags work on a
copy, which shares the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata

from torch import Tensor, nn

from activedpo_fast.pool.tokens import TokenizedPool
from benchmarks.rows.batches import RowsInOrder, dimension
from benchmarks.rows.hook_peers import Compute, bergson_hooks, dattri_logra
from benchmarks.rows.projections import (
    Project,
    bergson_dense,
    dattri_projection,
    torch_count_sketch,
    trak_projection,
)
from benchmarks.rows.whole_gradients import (
    Gradients,
    loop_gradients,
    opacus_gradients,
    vmap_gradients,
)


@dataclass(frozen=True)
class RowsPeer:
    """A way to compute the sketched gradient rows of a pool.

    name: as printed. package: what it needs from PyPI, None for torch alone.
    make(model, tokenized, k): sets it up and gives a call that computes all rows, float32 [R, k'].
        k' is k, except for hooks that project each module to p x p numbers: there it is the nearest
        that p allows. With k = None a row is the whole gradient, which any peer can give.
    quick: whether it can be repeated within seconds; drawing D x k numbers cannot.
    """

    name: str
    package: str | None
    make: Callable[[nn.Module, TokenizedPool, int | None], Compute]
    quick: bool = True


@dataclass(frozen=True)
class ProjectionPeer:
    """A random projection of whole gradients.

    make(D, k): sets it up and gives a call float32 [n, D] -> [n, k]. Random numbers that the
        package draws at every call are drawn in it. E<Sx, Sy> = <x, y>, by a factor of ours where
        the package leaves that to its user.
    """

    name: str
    package: str | None
    make: Callable[[int, int], Project]


def title(peer: RowsPeer | ProjectionPeer) -> str | None:
    """The name with the package's version; None where the package is not installed."""
    if peer.package is None:
        return peer.name
    try:
        return f"{peer.name} ({peer.package} {metadata.version(peer.package)})"
    except metadata.PackageNotFoundError:
        return None


def _sketched(
    model: nn.Module,
    tokenized: TokenizedPool,
    k: int | None,
    *,
    source: Callable[[nn.Module, TokenizedPool], Gradients],
    projection: Callable[[int, int], Project],
) -> Compute:
    """Whole gradients from `source`, batch by batch through `projection`."""
    gradients = source(model, tokenized)
    project: Project = (lambda x: x) if k is None else projection(dimension(model), k)

    def compute() -> Tensor:
        rows = RowsInOrder(len(tokenized.sequences))
        for batch, values in gradients():
            rows.put(batch, project(values))
        return rows.result()

    return compute


def _whole(
    name: str,
    package: str | None,
    source: Callable[[nn.Module, TokenizedPool], Gradients],
    projection: Callable[[int, int], Project],
) -> RowsPeer:
    return RowsPeer(
        name,
        package,
        partial(_sketched, source=source, projection=projection),
        quick=projection is torch_count_sketch,
    )


PROJECTION_PEERS = [
    ProjectionPeer("torch CountSketch (scatter_add_)", None, torch_count_sketch),
    ProjectionPeer("TRAK BasicProjector", "traker", trak_projection),
    ProjectionPeer("dattri rademacher", "dattri", partial(dattri_projection, kind="rademacher")),
    ProjectionPeer("dattri random_mask", "dattri", partial(dattri_projection, kind="random_mask")),
    ProjectionPeer("bergson rademacher", "bergson", bergson_dense),
]


ROWS_PEERS = [
    _whole("loop + torch CountSketch", None, loop_gradients, torch_count_sketch),
    _whole("loop + TRAK BasicProjector", "traker", loop_gradients, trak_projection),
    _whole(
        "loop + dattri rademacher",
        "dattri",
        loop_gradients,
        partial(dattri_projection, kind="rademacher"),
    ),
    _whole("loop + bergson rademacher", "bergson", loop_gradients, bergson_dense),
    _whole("torch.func vmap + torch CountSketch", None, vmap_gradients, torch_count_sketch),
    _whole("Opacus + torch CountSketch", "opacus", opacus_gradients, torch_count_sketch),
    RowsPeer("bergson hooks, per module", "bergson", partial(bergson_hooks, target="per_module")),
    RowsPeer(
        "bergson hooks, global", "bergson", partial(bergson_hooks, target="global"), quick=False
    ),
    RowsPeer("dattri LoGra hooks", "dattri", dattri_logra),
]
