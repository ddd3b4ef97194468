"""The comparisons of `benchmarks.fidelity`: exact gradient rows with their sketches, and the picks
of both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from activedpo_fast import FeatureExtractor, PreferencePool, Sketch
from activedpo_fast.demo.settings import SETTINGS
from activedpo_fast.gradients.sketch import SketchPlan
from activedpo_fast.gradients.trainable import trainable_parameters
from activedpo_fast.pool.tokens import TokenizedPool
from activedpo_fast.selection import greedy_logdet
from activedpo_fast.selection.pair_features import Normalize, PairFeatures

DEMO = SETTINGS["small"]
SEED = 0  # of adapter, prompts, responses, labels and training
CASES = ("initial", "trained")
METHODS = ("sjlt", "rademacher", "kronecker")
DIMS = (512, 1024, 2048, 4096, 8192)
DENSE_DIM = 4096  # the largest k at which the dense sketch is taken with more than one seed
PICKS = 50
CRITERIA: tuple[tuple[Normalize, float], ...] = (
    ("response", 1.0),
    ("pair", 1.0),
    (None, 1.0),
    ("response", 0.01),
)  # (normalize, lambda)
RANDOM_DRAWS = 50
CHECKED_ITEMS = 4
TIMED_ITEMS, ROUNDS = 50, 3
TOKENS = DEMO.selection["max_tokens_per_batch"]

Parameters = list[tuple[str, torch.Size]]
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A policy and the pool that was sampled from it."""

    name: str
    model: PeftModel
    pool: PreferencePool
    tokens: TokenizedPool

    def extractor(
        self, sketch: Sketch, gradient: str = "all_tokens", last_layers: int | None = None
    ) -> FeatureExtractor:
        """The extractor of this policy's gradient rows, with the demo's settings."""
        return FeatureExtractor(
            self.model,
            sketch,
            beta=DEMO.dpo["beta"],
            gradient=gradient,
            last_layers=last_layers,
            max_tokens_per_batch=TOKENS,
        )

    def parameters(self) -> Parameters:
        """(canonical name, shape) of the LoRA matrices, in the order of an unsketched row."""
        return trainable_parameters(self.model).shapes

    def head(self, items: int) -> TokenizedPool:
        """The responses of the first items."""
        rows = int(self.pool.response_offsets[min(items, len(self.pool))])
        own = self.tokens.items
        return TokenizedPool(self.tokens.sequences[:rows], [], own and own[:rows])


@dataclass(frozen=True)
class Exact:
    """Exact gradient rows of a pool, and R x R numbers that stand for them.

    rows: float32 [R, D]. norms: float64 [R]. cosines: float64 [R, R]. points: float64 [R, R], rows
    with the inner products of `rows` (an isometric image), which the greedy selection is fast on.
    """

    rows: Tensor
    norms: Tensor
    cosines: Tensor
    points: Tensor


def exact_rows(case: Case, gradient: str = "all_tokens") -> Exact:
    """The unsketched rows and their Gram matrix."""
    rows = case.extractor(Sketch("none"), gradient).gradients(case.tokens).gradients
    return from_rows(rows)


def from_rows(rows: Tensor) -> Exact:
    """The rows [R, D] with the numbers that stand for them."""
    gram = gram_matrix(rows)
    norms = gram.diagonal().sqrt()
    cosines = gram / norms[:, None] / norms
    values, vectors = torch.linalg.eigh(cosines)
    points = vectors * values.clamp(min=0).sqrt() * norms[:, None]
    return Exact(rows, norms, cosines, points)


def gram_matrix(rows: Tensor, width: int = 8192, height: int = 750) -> Tensor:
    """rows rowsᵀ in float64, [R, R], of float32 rows [R, D] that are converted `width` at a time.

    Only blocks on and below the diagonal are multiplied.
    """
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for columns in tqdm(rows.split(width, dim=1), desc="exact Gram", unit="block", disable=None):
        if not columns.any():  # gradients of A while B = 0
            continue
        part = columns.double()
        for top in range(0, len(rows), height):
            gram[top:, top : top + height] += part[top:] @ part[top : top + height].T
    return gram.tril() + gram.tril(-1).T


def sketch_rows(rows: Tensor, parameters: Parameters, sketch: Sketch) -> Tensor:
    """Sketches of exact rows [R, D], float64 [R, k], by the operation that the extractor uses.

    A gradient [m, n] is the sum over i of e_i times its i-th row, which is the sum of outer
    products that the operation asks for (over the shorter side, to have few of them).
    """
    plan = SketchPlan(sketch, parameters)
    out = torch.zeros(len(rows), plan.dim, dtype=torch.float64)
    column = 0
    for name, shape in parameters:
        block = rows[:, column : column + math.prod(shape)].reshape(len(rows), *shape)
        column += math.prod(shape)
        if not block.any():
            continue
        terms = min(shape)
        ends = terms * torch.arange(1, len(rows) + 1)
        segments = torch.stack([ends - terms, ends, torch.arange(len(rows))], dim=1)
        units = torch.eye(terms).repeat(len(rows), 1)
        by_row = shape[0] == terms
        other = (block if by_row else block.mT).reshape(len(rows) * terms, -1)
        left, right = (units, other) if by_row else (other, units)
        plan.add(out, [(name, left, right)], segments)
    return out


def sketches_of(
    rows: Tensor, parameters: Parameters, method: str, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """(k, sketched rows float64 [R, k]) for every k at which this method and seed are measured."""
    if method != "rademacher":
        for k in DIMS:
            yield k, sketch_rows(rows, parameters, Sketch(method, k, seed))
        return
    # The signs of a column do not depend on k: the smaller sketches are columns of the largest.
    most = max(k for k in DIMS if seed == 0 or k <= DENSE_DIM)
    largest = sketch_rows(rows, parameters, Sketch(method, most, seed))
    for k in DIMS:
        if k <= most:
            yield k, largest[:, :k] * math.sqrt(most / k)


def check_sketches(case: Case, exact: Exact) -> None:
    """Assert, on a few items, that the measured rows are those of the extractor."""
    tokens, parameters = case.head(CHECKED_ITEMS), case.parameters()
    rows = exact.rows[: len(tokens.sequences)]
    for method in METHODS:
        for k, sketched in sketches_of(rows, parameters, method, 0):
            given = case.extractor(Sketch(method, k)).gradients(tokens, show_progress=False)
            error = float((given.gradients - sketched).norm() / sketched.norm())
            assert error < 1e-5, f"{method}, k = {k}: the extractor differs by {error:.1e}"


def check_points(case: Case, exact: Exact) -> None:
    """Assert that the selection takes the same pairs from `points` as from the rows themselves."""
    pairs = case.pool.pairs()[: DEMO.num_generations * TIMED_ITEMS]
    n, count = int(pairs.max()) + 1, min(PICKS, len(pairs))
    for normalize, lam in CRITERIA:
        chosen = [
            greedy_logdet(
                x[:n], pairs, count, lam=lam, normalize=normalize, show_progress=False
            ).indices
            for x in (exact.rows, exact.points)
        ]
        assert chosen[0].equal(chosen[1]), f"{normalize}, lambda {lam}: other picks"


def geometry(sketched: Tensor, exact: Exact, pairs: Tensor) -> Record:
    """How much the sketch S changes angles and lengths; x, y are rows scaled to unit norm.

    inner_product_error: |<Sx, Sy> - <x, y>| over |<x, y>|, root sums of squares over x ≠ y.
    pair_product_error: the same for the features of pairs, x_a - x_b.
    cosine_error: rms of cos(Sx, Sy) - cos(x, y) over x ≠ y. norm_error: rms of |Sx| - 1.
    Products are formed in float32, whose rounding is far below what is measured.
    """
    unit = (sketched / exact.norms[:, None]).float()
    gram, cosines = unit @ unit.T, exact.cosines.float()
    lengths = gram.diagonal().sqrt()
    angle_error = _off_diagonal(gram / lengths[:, None] / lengths - cosines)
    return {
        "inner_product_error": _size(_off_diagonal(gram - cosines)) / _size(_off_diagonal(cosines)),
        "pair_product_error": _size(_off_diagonal(_of_pairs(gram - cosines, pairs)))
        / _size(_off_diagonal(_of_pairs(cosines, pairs))),
        "cosine_error": _size(angle_error) / math.sqrt(len(gram) * (len(gram) - 1)),
        "norm_error": _size(lengths - 1) / math.sqrt(len(gram)),
    }


def _of_pairs(gram: Tensor, pairs: Tensor) -> Tensor:
    """Inner products of differences, [N, N], from those of rows [R, R]."""
    a, b = pairs.unbind(1)
    half = gram[a] - gram[b]
    return half[:, a] - half[:, b]


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - matrix.diagonal().diag()


def _size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def logdet(points: Tensor, pairs: Tensor, normalize: Normalize, lam: float) -> float:
    """log det(I + Φ Φᵀ / λ) of the features Φ of some pairs (κ = 1)."""
    phi = PairFeatures(points, pairs, normalize).at(torch.arange(len(pairs)))
    eye = torch.eye(len(pairs), dtype=torch.float64)
    return float(torch.linalg.slogdet(eye + phi @ phi.T / lam).logabsdet)


def reference_picks(case: Case, exact: Exact) -> list[Record]:
    """For every criterion: the exact picks, their log det, and that of random pairs."""
    pairs, records = case.pool.pairs(), []
    count = min(PICKS, len(pairs))
    for normalize, lam in CRITERIA:
        picks = greedy_logdet(exact.points, pairs, count, lam=lam, normalize=normalize).indices
        draws = [
            torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
            for seed in range(RANDOM_DRAWS)
        ]
        at_random = [logdet(exact.points, pairs[draw], normalize, lam) for draw in draws]
        records.append(
            {
                "case": case.name,
                "normalize": normalize,
                "lam": lam,
                "picks": picks.tolist(),
                "logdet": logdet(exact.points, pairs[picks], normalize, lam),
                "logdet_random": statistics.mean(at_random),
                "logdet_random_sd": statistics.stdev(at_random),
                "overlap_random": statistics.mean(
                    int(torch.isin(draw, picks).sum()) for draw in draws
                ),
                "largest_pairs_logdet": logdet(
                    exact.points,
                    pairs[_largest(exact.points, pairs, normalize, count)],
                    normalize,
                    lam,
                ),
            }
        )
    return records


def _largest(points: Tensor, pairs: Tensor, normalize: Normalize, count: int) -> Tensor:
    """The pairs with the largest features: the picks of a selection without V."""
    return PairFeatures(points, pairs, normalize).size.topk(count).indices


def selection(sketched: Tensor, exact: Exact, pairs: Tensor, reference: Record) -> Record:
    """The picks from sketched rows, judged by the exact rows and beside the exact picks.

    overlap: exact picks among them. ratio: log det of these picks over that of the exact picks.
    fraction: the same counted from random pairs, which have 0.
    """
    picks = greedy_logdet(
        sketched,
        pairs,
        len(reference["picks"]),
        lam=reference["lam"],
        normalize=reference["normalize"],
        show_progress=False,
    ).indices
    return judge(picks, exact, pairs, reference)


def judge(picks: Tensor, exact: Exact, pairs: Tensor, reference: Record) -> Record:
    """Some picks, judged by the exact rows and beside the exact picks; see `selection`."""
    normalize, lam = reference["normalize"], reference["lam"]
    reached = logdet(exact.points, pairs[picks], normalize, lam)
    best, chance = reference["logdet"], reference["logdet_random"]
    return {
        "normalize": normalize,
        "lam": lam,
        "overlap": len(set(picks.tolist()) & set(reference["picks"])),
        "logdet": reached,
        "ratio": reached / best,
        "fraction": (reached - chance) / (best - chance),
    }


def describe(case: Case, exact: Exact) -> Record:
    """Describe the exact rows of a case."""
    share, column = 0.0, 0
    for name, shape in case.parameters():
        block = exact.rows[:, column : column + math.prod(shape)]
        column += math.prod(shape)
        if ".lora_A." in name:
            share += float((block.double() / exact.norms[:, None]).square().sum())
    return {
        "case": case.name,
        "prompts": len(case.pool),
        "responses": len(exact.rows),
        "pairs": len(case.pool.pairs()),
        "numbers_in_a_gradient": column,
        "share_of_A": share / len(exact.rows),
        "norm_quantiles": torch.quantile(
            exact.norms, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double()
        ).tolist(),
        "rms_cosine": _size(_off_diagonal(exact.cosines))
        / math.sqrt(len(exact.rows) * (len(exact.rows) - 1)),
    }
