"""Gradient rows of a pool: ours, the alternatives, and the floor of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from activedpo_fast import FeatureExtractor, Sketch
from activedpo_fast.pool.tokens import TokenizedPool
from benchmarks.rows.floor import without_capture
from benchmarks.rows.measure import errors, peak_memory, side_by_side
from benchmarks.rows.peers import ROWS_PEERS, RowsPeer, title
from benchmarks.rows.workloads import PlainForward, Workload

OURS = [
    ("sjlt", "pair"),
    ("sjlt", "response"),
    ("kronecker", "pair"),
    ("kronecker", "response"),
    ("rademacher", "pair"),
    ("rademacher", "response"),
]


@pytest.mark.parametrize(("method", "normalize"), OURS)
def test_ours(benchmark, workload: Workload, method: str, normalize: str) -> None:
    extractor = FeatureExtractor(workload.model, Sketch(method, workload.k), beta=1.0)
    extractor.check(workload.tokenized)  # done once for a model, so not part of the rounds
    rows = _measure(
        benchmark,
        workload,
        f"**ours**, {method}, {normalize!r}",
        _gradients(extractor, workload, normalize),
        workload.rounds,
    )
    exact = workload.exact
    if normalize == "pair":
        first = _first_rows(workload)
        kept = torch.arange(len(first)) != first  # an item's first row is zero
        rows, exact = rows[kept], (exact - exact[first])[kept]
    benchmark.extra_info.update(errors(rows, exact))


@pytest.mark.parametrize("layers", ["all layers", "half of the layers"])
def test_response_tokens(benchmark, workload: Workload, layers: str) -> None:
    """Prompts as constants; the errors are of the sketch and of what is left out."""
    extractor = FeatureExtractor(workload.model, Sketch("sjlt", workload.k), beta=1.0)
    extractor = extractor.of_response_tokens(_last_layers(workload, layers))
    extractor.check(workload.tokenized)
    rows = _measure(
        benchmark,
        workload,
        f"**ours**, sjlt, response tokens{_suffix(extractor)}",
        _gradients(extractor, workload, "response"),
        workload.rounds,
    )
    benchmark.extra_info.update(errors(rows, workload.exact))


@pytest.mark.parametrize("normalize", ["pair", "response"])
@pytest.mark.parametrize(
    ("layers", "per_pick"), [("all layers", 10), ("all layers", 2), ("half of the layers", 2)]
)
def test_two_stages(
    benchmark, workload: Workload, layers: str, per_pick: int, normalize: str
) -> None:
    """Cheap rows of all responses, then exact rows of those in a part of the pairs.

    The part is what `per_pick` leaves of the paper's 3,000 pairs for 50 picks. Here they are the
    first pairs of items at equal distances: which they are has little effect on the time. A small
    workload has more than this part, as one pair of it is the least.
    """
    exact = FeatureExtractor(workload.model, Sketch("sjlt", workload.k), beta=1.0)
    cheap = exact.of_response_tokens(_last_layers(workload, layers))
    tokens, relative = workload.tokenized, normalize == "pair"
    part = tokens.only(_rows_of_first_pairs(tokens, per_pick * 50 / 3000))
    for extractor, needed in ((cheap, tokens), (exact, part)):
        extractor.check(needed)

    def compute() -> list[Tensor]:
        return [
            extractor.gradients(needed, relative=relative, show_progress=False).gradients
            for extractor, needed in ((cheap, tokens), (exact, part))
        ]

    _measure(
        benchmark,
        workload,
        f"**ours**, sjlt, two stages{_suffix(cheap)}, {per_pick} pairs per pick, {normalize!r}",
        compute,
        workload.rounds,
    )
    benchmark.extra_info["exact share"] = len(part.sequences) / len(tokens.sequences)


@pytest.mark.parametrize("normalize", ["pair", "response"])
def test_floor(benchmark, workload: Workload, normalize: str) -> None:
    """The same passes over the same batches without capture and sketch."""
    extractor = FeatureExtractor(workload.model, Sketch("sjlt", workload.k), beta=1.0)
    extractor.check(workload.tokenized)
    gradients = _gradients(extractor, workload, normalize)
    _measure(
        benchmark,
        workload,
        f"floor: same passes, no capture, {normalize!r}",
        lambda: without_capture(gradients),
        workload.rounds,
    )


@pytest.mark.parametrize(
    ("method", "normalize"),
    [("sjlt", "pair"), ("sjlt", "response"), ("kronecker", "response"), ("rademacher", "response")],
)
def test_overhead(benchmark, workload: Workload, method: str, normalize: str) -> None:
    """Capture and sketch, as a ratio to the floor in the same rounds."""
    extractor = FeatureExtractor(workload.model, Sketch(method, workload.k), beta=1.0)
    extractor.check(workload.tokenized)
    gradients = _gradients(extractor, workload, normalize)

    def floor() -> None:
        without_capture(gradients)

    benchmark.group = "overhead"
    benchmark.extra_info.update(workload=workload.name, contender=f"{method}, {normalize!r}")
    side_by_side(benchmark, gradients, floor, rounds=workload.rounds)


def test_training_pass(benchmark, workload: Workload) -> None:
    """Forward and backward as in training: one gradient for all responses, no rows of their own."""
    batches = PlainForward(workload.model, workload.tokenized, 2048).batches
    parameters = [p for p in workload.model.parameters() if p.requires_grad]

    def compute() -> None:
        for ids, mask in batches:
            logits = workload.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            torch.autograd.grad((logps * mask[:, 1:]).sum(), parameters)

    _measure(
        benchmark,
        workload,
        "forward and backward as in training, no rows",
        compute,
        workload.rounds,
    )


def test_loop(benchmark, workload: Workload) -> None:
    """One backward pass per response, whole gradients and no sketch; these are also the exact
    rows."""
    compute = ROWS_PEERS[0].make(workload.model, workload.tokenized, None)
    rows = _measure(
        benchmark, workload, "loop of backward passes, no sketch", compute, workload.rounds
    )
    found = errors(rows, workload.exact)
    # All errors here are relative to the rows of autograd.
    assert found["cosine error"] < 1e-4 and found["norm distortion"] < 1e-4


@pytest.mark.parametrize("peer", ROWS_PEERS, ids=lambda peer: peer.name)
def test_peer(benchmark, workload: Workload, peer: RowsPeer) -> None:
    name = title(peer)
    if name is None:
        pytest.skip(f"{peer.package} is not installed (make bench installs it)")
    compute = peer.make(workload.model, workload.tokenized, workload.k)
    rows = _measure(benchmark, workload, name, compute, workload.rounds if peer.quick else 1)
    benchmark.extra_info.update(errors(rows, workload.exact), k=rows.shape[1])


def _measure(
    benchmark, workload: Workload, name: str, compute: Callable[[], Any], rounds: int
) -> Any:
    """Measure time and memory of `compute`, next to a plain forward pass; return its result."""
    benchmark.group = "rows"
    benchmark.extra_info.update(
        workload=workload.name, pool=workload.describe(), contender=name, k=workload.k
    )
    rows = side_by_side(benchmark, compute, workload.forward, rounds=rounds)
    if rounds > 1:
        benchmark.extra_info["peak MiB"] = peak_memory(compute)
    return rows


def _gradients(
    extractor: FeatureExtractor, workload: Workload, normalize: str
) -> Callable[[], Tensor]:
    return lambda: (
        extractor.gradients(
            workload.tokenized, relative=normalize == "pair", show_progress=False
        ).gradients
    )


def _last_layers(workload: Workload, layers: str) -> int | None:
    count: int = workload.model.config.num_hidden_layers
    return None if layers == "all layers" else count // 2


def _suffix(extractor: FeatureExtractor) -> str:
    layers = extractor.last_layers
    return "" if layers is None else f" of the last {layers} layers"


def _rows_of_first_pairs(tokens: TokenizedPool, share: float) -> list[int]:
    """The rows of as many pairs as `share` of all: the first pair of items at equal distances."""
    items = [tokens.item_of(row) for row in range(len(tokens.sequences))]
    first = {item: items.index(item) for item in dict.fromkeys(items)}
    pairs = sum(math.comb(items.count(item), 2) for item in first)
    wanted = max(1, round(share * pairs))
    assert wanted <= len(first), "more pairs than items"
    starts = list(first.values())
    chosen = [starts[n * len(starts) // wanted] for n in range(wanted)]
    return [row for start in chosen for row in (start, start + 1)]


def _first_rows(workload: Workload) -> Tensor:
    """int64 [R]: the first row of each row's item."""
    items = [workload.tokenized.item_of(r) for r in range(len(workload.tokenized.sequences))]
    return torch.tensor([items.index(item) for item in items])
