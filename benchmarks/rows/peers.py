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

import copy
import importlib
import io
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse

# Padded. On two cores, all batched peers were at least as fast with this as with bergson's default
# of 2048.
TOKENS_A_BATCH = 1024
GRADIENT_BYTES = 2**28  # whole gradients held at a time
IGNORED = -100  # the label that cross_entropy ignores

Compute = Callable[[], Tensor]  # -> float32 [R, k'], in pool order
Project = Callable[[Tensor], Tensor]  # float32 [n, D] -> [n, k]
Gradients = Callable[[], Iterator[tuple[list[int], Tensor]]]  # (rows, float32 [len(rows), D])


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


# ---- responses to batches ----


def _labels(response: TokenizedResponse) -> list[int]:
    start = max(response.completion_start, 1)
    return [IGNORED] * start + response.input_ids[start:]


def _dimension(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in _trainable(model).values())


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _rows_at_once(dim: int) -> int:
    return max(1, GRADIENT_BYTES // (4 * dim))


def _plan(tokenized: TokenizedPool, dim: int) -> list[list[int]]:
    """Rows by batch: of similar length, within TOKENS_A_BATCH and GRADIENT_BYTES."""
    lengths = [len(response.input_ids) for response in tokenized.sequences]
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[batches[-1][0]] if batches else 0
        if (
            not batches
            or longest * (len(batches[-1]) + 1) > TOKENS_A_BATCH
            or len(batches[-1]) == _rows_at_once(dim)
        ):
            batches.append([])
        batches[-1].append(row)
    return batches


def _collate(tokenized: TokenizedPool, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, int64 [n, T], padded on the right.

    A causal model needs no attention mask for that: no scored token sees the padding.
    """
    responses = [tokenized.sequences[row] for row in rows]
    longest = max(len(response.input_ids) for response in responses)

    def pad(values: list[int], by: int) -> list[int]:
        return values + [by] * (longest - len(values))

    ids = torch.tensor([pad(response.input_ids, 0) for response in responses])
    return ids, torch.tensor([pad(_labels(response), IGNORED) for response in responses])


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of log π over the scored tokens of all rows; logits [n, T, vocabulary]."""
    return -F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _private_copy(model: nn.Module) -> Any:
    """A copy for hooks and flags, which shares the storage of all parameters."""
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo=shared)


# ---- whole gradients ----


def _loop_gradients(model: nn.Module, tokenized: TokenizedPool) -> Gradients:
    """One forward and backward pass per response: the obvious implementation."""
    parameters = list(_trainable(model).values())
    dim = _dimension(model)

    def gradients() -> Iterator[tuple[list[int], Tensor]]:
        for begin in range(0, len(tokenized.sequences), _rows_at_once(dim)):
            end = min(begin + _rows_at_once(dim), len(tokenized.sequences))
            block = torch.empty(end - begin, dim)
            for row in range(begin, end):
                ids, labels = _collate(tokenized, [row])
                logp = _log_likelihood(model(input_ids=ids, use_cache=False).logits, labels)
                parts = torch.autograd.grad(logp, parameters)
                torch.cat([part.flatten() for part in parts], out=block[row - begin])
            yield list(range(begin, end)), block

    return gradients


def _vmap_gradients(model: nn.Module, tokenized: TokenizedPool) -> Gradients:
    """torch.func: vmap over the gradient of one response's log-likelihood.

    A batch is within TOKENS_A_BATCH already, so vmap's own chunk_size has nothing to cut. Attention
    is "eager": vmap has no rule for the CPU's fused attention, and would process its rows one by
    one.
    """
    from torch.func import functional_call, grad, vmap

    copied = _private_copy(model)
    copied.set_attn_implementation("eager")
    parameters = {name: p.detach() for name, p in _trainable(model).items()}
    dim = _dimension(model)

    def logp(parameters: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "use_cache": False}
        return _log_likelihood(functional_call(copied, parameters, (), inputs).logits, labels[None])

    per_response = vmap(grad(logp), in_dims=(None, 0, 0))

    def gradients() -> Iterator[tuple[list[int], Tensor]]:
        for rows in _plan(tokenized, dim):
            found = per_response(parameters, *_collate(tokenized, rows))
            yield rows, torch.cat([found[name].flatten(1) for name in parameters], dim=1)

    return gradients


def _opacus_gradients(model: nn.Module, tokenized: TokenizedPool) -> Gradients:
    """Opacus' `GradSampleModule`, whose backward pass leaves a `grad_sample` at each parameter."""
    from opacus import GradSampleModule

    copied = _private_copy(model)
    # Its hooks record only modules in training mode; all other modules stay without dropout.
    for module in copied.modules():
        module.training = isinstance(module, nn.Linear)
    sampled = GradSampleModule(copied, loss_reduction="sum")
    dim = _dimension(model)

    def gradients() -> Iterator[tuple[list[int], Tensor]]:
        for rows in _plan(tokenized, dim):
            ids, labels = _collate(tokenized, rows)
            _log_likelihood(sampled(input_ids=ids, use_cache=False).logits, labels).backward()
            found = [vars(p)["grad_sample"].flatten(1) for p in _trainable(copied).values()]
            yield rows, torch.cat(found, dim=1)
            sampled.zero_grad(set_to_none=True)

    return gradients


# ---- projections of whole gradients ----


def _torch_count_sketch(dim: int, k: int) -> Project:
    """One non-zero per column in plain torch, with random numbers that are drawn once."""
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randint(k, (dim,), generator=generator)
    signs = torch.randint(2, (dim,), generator=generator).float() * 2 - 1

    def project(x: Tensor) -> Tensor:
        return torch.zeros(len(x), k).scatter_add_(1, buckets.expand(len(x), dim), x * signs)

    return project


def _trak(dim: int, k: int) -> Project:
    """TRAK's projector for the CPU, its block of columns drawn again at every call; unscaled."""
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(
        grad_dim=dim,
        proj_dim=k,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"),
    )
    return lambda x: projector.project(x, model_id=0) * k**-0.5


def _dattri(dim: int, k: int, kind: str) -> Project:
    """dattri's `random_project`; on the CPU it is TRAK's algorithm, scaled by 1 / sqrt(k).

    "random_mask" is k of the D numbers, not sums of them, and unscaled: its error depends on how
    even the gradient is.
    """
    from dattri.func.projection import random_project

    # The sample tells it the length and the dtype; expanded, it takes no memory.
    project = random_project(
        torch.zeros(1).expand(1, dim),
        1,
        k,
        proj_max_batch_size=32,
        proj_seed=0,
        proj_type=kind,
        device="cpu",
    )
    return project if kind != "random_mask" else lambda x: project(x) * math.sqrt(dim / k)


def _bergson_dense(dim: int, k: int) -> Project:
    """bergson's dense projection of one matrix, its Philox signs drawn at every call."""
    project_global = _bergson("collector.collector").project_global

    def project(x: Tensor) -> Tensor:
        return project_global("gradient/single", x, k, "rademacher", "jl")

    return project


PROJECTION_PEERS = [
    ProjectionPeer("torch CountSketch (scatter_add_)", None, _torch_count_sketch),
    ProjectionPeer("TRAK BasicProjector", "traker", _trak),
    ProjectionPeer("dattri rademacher", "dattri", partial(_dattri, kind="rademacher")),
    ProjectionPeer("dattri random_mask", "dattri", partial(_dattri, kind="random_mask")),
    ProjectionPeer("bergson rademacher", "bergson", _bergson_dense),
]


# ---- gradients that are projected as they are formed ----


def module_side(model: nn.Module, k: int) -> tuple[int, int]:
    """(p, k'): the p for which p x p numbers per LoRA matrix come nearest to k, and their total
    number."""
    modules = len(_trainable(model))
    low = max(1, math.isqrt(k // modules))
    side = min((low, low + 1), key=lambda p: abs(modules * p * p - k))
    return side, modules * side * side


def _bergson_hooks(
    model: nn.Module, tokenized: TokenizedPool, k: int | None, *, target: str
) -> Compute:
    """bergson's collector, set up as its `build` command does, with the rows kept in memory.

    target: "per_module" projects both sides of each LoRA matrix's gradient, to p x p numbers
        (`module_side`); "global" adds a dense projection of each, k numbers in all.
    """
    _bergson()
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from bergson.data import allocate_batches
    from bergson.utils.worker_utils import extract_peft_target_modules
    from datasets import Dataset

    copied = _private_copy(model)
    modules = extract_peft_target_modules(copied)
    # As in its `setup_model_and_peft`: hooks need gradients of activations, not of parameters.
    copied.requires_grad_(False)
    copied.get_input_embeddings().requires_grad_(True)
    side = k if k is None or target == "global" else module_side(model, k)[0]
    processor = GradientProcessor(projection_dim=side, projection_target=target)
    sequences = tokenized.sequences
    data = Dataset.from_dict(
        {
            "input_ids": [response.input_ids for response in sequences],
            "labels": [_labels(response) for response in sequences],
        }
    )
    lengths = [len(response.input_ids) for response in sequences]
    batches = allocate_batches(lengths, max(TOKENS_A_BATCH, max(lengths)))

    def compute() -> Tensor:
        with tempfile.TemporaryDirectory() as folder, _quiet():
            config = IndexConfig(run_path=f"{folder}/run", token_batch_size=TOKENS_A_BATCH)
            config.partial_run_path.mkdir()  # a count of tokens is written there at the end
            collector = InMemoryCollector(
                model=copied.base_model,
                data=data,
                cfg=config,
                processor=processor,
                target_modules=modules,
            )
            CollectorComputer(
                copied, data, collector=collector, batches=batches, cfg=config
            ).run_with_collector_hooks()
        # It differentiates the loss, which is -log π.
        return -torch.cat(list(collector.gradients.values()), dim=1)

    return compute


def _dattri_logra(model: nn.Module, tokenized: TokenizedPool, k: int | None) -> Compute:
    """dattri's LoGra: the hooks and compressors that its `LoGraAttributor` makes for `cache`.

    Each LoRA matrix's gradient is projected on both sides by normal numbers, to p x p
    (`module_side`); with k = None on neither side.
    """
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    copied = _private_copy(model)
    layers = [name.removesuffix(".weight") for name in _trainable(copied)]
    identity = {"device": "cpu", "proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}
    side = None if k is None else module_side(model, k)[0]
    sides = identity if side is None else {**identity, "proj_dim": side, "proj_type": "normal"}
    plan = _plan(tokenized, _dimension(model))
    compressors = setup_model_compressors(
        copied,
        layers,
        sparsifier_kwargs=sides,
        projector_kwargs=identity,
        sample_inputs={"input_ids": _collate(tokenized, plan[-1])[0]},
        device="cpu",
    )
    manager = HookManager(copied, layers)
    manager.set_compressors(compressors)

    def compute() -> Tensor:
        rows = _Rows(len(tokenized.sequences))
        # It compiles its compressor again for each layer and shape, which takes far longer than
        # running it.
        with torch.compiler.set_stance("force_eager"):
            for batch in plan:
                ids, labels = _collate(tokenized, batch)
                logp = _log_likelihood(copied(input_ids=ids, use_cache=False).logits, labels)
                # Its rows are gradients of the mean over the batch, so they are multiplied by the
                # batch size.
                (logp / len(batch)).backward()
                rows.put(batch, torch.cat(manager.get_compressed_grads(), dim=1))
        return rows.result()

    return compute


# ---- whole peers ----


class _Rows:
    """Collects batches of rows into one tensor in pool order."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._all: Tensor | None = None

    def put(self, rows: list[int], values: Tensor) -> None:
        if self._all is None:
            self._all = torch.zeros(self._count, values.shape[1])
        self._all[rows] = values

    def result(self) -> Tensor:
        assert self._all is not None, "no batch was computed"
        return self._all


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
    project: Project = (lambda x: x) if k is None else projection(_dimension(model), k)

    def compute() -> Tensor:
        rows = _Rows(len(tokenized.sequences))
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
        quick=projection is _torch_count_sketch,
    )


ROWS_PEERS = [
    _whole("loop + torch CountSketch", None, _loop_gradients, _torch_count_sketch),
    _whole("loop + TRAK BasicProjector", "traker", _loop_gradients, _trak),
    _whole(
        "loop + dattri rademacher", "dattri", _loop_gradients, partial(_dattri, kind="rademacher")
    ),
    _whole("loop + bergson rademacher", "bergson", _loop_gradients, _bergson_dense),
    _whole("torch.func vmap + torch CountSketch", None, _vmap_gradients, _torch_count_sketch),
    _whole("Opacus + torch CountSketch", "opacus", _opacus_gradients, _torch_count_sketch),
    RowsPeer("bergson hooks, per module", "bergson", partial(_bergson_hooks, target="per_module")),
    RowsPeer(
        "bergson hooks, global", "bergson", partial(_bergson_hooks, target="global"), quick=False
    ),
    RowsPeer("dattri LoGra hooks", "dattri", _dattri_logra),
]


# ---- bergson's manners ----


def _bergson(module: str = "") -> ModuleType:
    """Import bergson, which replaces the handlers of the root logger, and restore them."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    kept = importlib.import_module(f"bergson.{module}" if module else "bergson")
    root.handlers[:] = handlers
    root.setLevel(level)
    return kept


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide bergson's progress bars and lists of modules, for which it has no options."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
