"""What a sketch costs in the quality of the selection, on the demo's own model and pool.

    python -m benchmarks.fidelity --help

Exact gradient rows (156,160 numbers each) are kept whole and compared with their sketches: inner
products, the pairs that the greedy selection takes, and the log det that these pairs reach under
the exact kernel. Two policies are looked at: LoRA at its initialisation (B = 0, everybody's first
round) and after one round of DPO. Adapter, sampled pools and finished parts of the comparison are
kept in the work folder, so that an interrupted run continues; times are always taken anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from activedpo_fast import FeatureExtractor, PreferencePool, Sketch
from activedpo_fast._files import atomic_path, write_atomic
from activedpo_fast.demo.language_model import load_base, read_prompts, with_fresh_lora
from activedpo_fast.demo.settings import SETTINGS
from activedpo_fast.demo.similarity import SynopsisSimilarity
from activedpo_fast.features.parameters import trainable_linears
from activedpo_fast.features.sketch import SketchPlan
from activedpo_fast.generation import generate_responses
from activedpo_fast.labeling import RewardOracle
from activedpo_fast.loop import ActiveDPOLoop, draw_prompts
from activedpo_fast.selection import greedy_logdet
from activedpo_fast.selection.normalize import Normalize, PairFeatures
from activedpo_fast.tokenization import TokenizedPool, tokenize_pool
from activedpo_fast.trl import dpo_config

DEMO = SETTINGS["small"]
SEED = 0  # of adapter, prompts, responses, labels and training
CASES = ("initial", "trained")
METHODS = ("sjlt", "rademacher", "kronecker")
DIMS = (512, 1024, 2048, 4096, 8192)
DENSE_DIM = 4096  # the largest k at which the dense sketch is taken with more than one seed
PICKS = 50
CRITERIA: tuple[tuple[Normalize, float], ...] = (
    ("response", 1.0), ("pair", 1.0), (None, 1.0), ("response", 0.01))  # (normalize, lambda)
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

    def extractor(self, sketch: Sketch) -> FeatureExtractor:
        """What takes this policy's gradient rows, with the demo's settings."""
        return FeatureExtractor(self.model, sketch, beta=DEMO.dpo["beta"],
                                max_tokens_per_batch=TOKENS)

    def parameters(self) -> Parameters:
        """(canonical name, shape) of the LoRA matrices, in the order of an unsketched row."""
        return [shape for linear in trainable_linears(self.model) for shape in linear.shapes()]

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


# -- policies and pools ---------------------------------------------------------------------------


def prepare(name: str, n_prompts: int, folder: Path) -> Case:
    """The policy `name` of CASES with a pool of its own responses, from disk where they are."""
    base, tokenizer = load_base("small")
    model = with_fresh_lora(base, DEMO, SEED)
    prompts = read_prompts("pool", max_words=DEMO.max_words)
    if name == "trained":
        _one_round(model, tokenizer, prompts, folder / "dpo")
    path = folder / f"prompts-{n_prompts}" / f"pool-{name}.jsonl"
    if not path.exists():
        drawn = draw_prompts(prompts, 0, n_prompts, set(), SEED)
        generate_responses(model, tokenizer, drawn, n_responses=DEMO.n_responses, seed=SEED,
                           **DEMO.generation).to_jsonl(path)
    pool = PreferencePool.from_jsonl(path)
    tokens = tokenize_pool(pool, tokenizer, max_length=DEMO.dpo["max_length"])
    return Case(name, model, pool, tokens)


def _one_round(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any],
               folder: Path) -> None:
    """One round of the demo with random pairs; the model is left with the trained adapter."""
    ActiveDPOLoop(
        model, tokenizer, prompts,
        RewardOracle(SynopsisSimilarity(), temperature=DEMO.temperature, seed=SEED),
        output_dir=folder,
        dpo_args=dpo_config(output_dir=str(folder / "trainer"), seed=SEED, **DEMO.dpo),
        strategy="random", selector_options={"seed": SEED}, batch_size=DEMO.batch_size, rounds=1,
        prompts_per_round=DEMO.prompts_per_round, n_responses=DEMO.n_responses,
        generation=DEMO.generation, seed=SEED,
    ).run()


# -- exact rows and their sketches ----------------------------------------------------------------


def exact_rows(case: Case) -> Exact:
    """The unsketched rows and their Gram matrix."""
    rows = case.extractor(Sketch("none")).gradients(case.tokens).gradients
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
            gram[top:, top:top + height] += part[top:] @ part[top:top + height].T
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
        block = rows[:, column:column + math.prod(shape)].reshape(len(rows), *shape)
        column += math.prod(shape)
        if not block.any():
            continue
        terms = min(shape)
        ends = terms * torch.arange(1, len(rows) + 1)
        segments = torch.stack([ends - terms, ends, torch.arange(len(rows))], dim=1)
        units = torch.eye(terms).repeat(len(rows), 1)
        by_row = shape[0] == terms
        other = (block if by_row else block.mT).reshape(len(rows) * terms, -1)
        plan.add(out, name, *((units, other) if by_row else (other, units)), segments)
    return out


def sketches_of(rows: Tensor, parameters: Parameters, method: str,
                seed: int) -> Iterator[tuple[int, Tensor]]:
    """(k, sketched rows float64 [R, k]) for every k that this method and seed are measured at."""
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
    """Assert that what is measured is what the extractor gives, on a few items."""
    tokens, parameters = case.head(CHECKED_ITEMS), case.parameters()
    rows = exact.rows[:len(tokens.sequences)]
    for method in METHODS:
        for k, sketched in sketches_of(rows, parameters, method, 0):
            given = case.extractor(Sketch(method, k)).gradients(tokens, show_progress=False)
            error = float((given.gradients - sketched).norm() / sketched.norm())
            assert error < 1e-5, f"{method}, k = {k}: the extractor differs by {error:.1e}"


def check_points(case: Case, exact: Exact) -> None:
    """Assert that the selection takes the same pairs from `points` as from the rows themselves."""
    pairs = case.pool.pairs()[:DEMO.n_responses * TIMED_ITEMS]
    n, count = int(pairs.max()) + 1, min(PICKS, len(pairs))
    for normalize, lam in CRITERIA:
        chosen = [greedy_logdet(x[:n], pairs, count, lam=lam, normalize=normalize,
                                show_progress=False).indices for x in (exact.rows, exact.points)]
        assert chosen[0].equal(chosen[1]), f"{normalize}, lambda {lam}: other picks"


# -- measures -------------------------------------------------------------------------------------


def geometry(sketched: Tensor, exact: Exact, pairs: Tensor) -> Record:
    """How far the sketch S bends angles and lengths; x, y are rows scaled to unit norm.

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
        "inner_product_error":
            _size(_off_diagonal(gram - cosines)) / _size(_off_diagonal(cosines)),
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
    """For every criterion: the exact picks, their log det, and that of pairs drawn at random."""
    pairs, records = case.pool.pairs(), []
    count = min(PICKS, len(pairs))
    for normalize, lam in CRITERIA:
        picks = greedy_logdet(exact.points, pairs, count, lam=lam, normalize=normalize).indices
        draws = [torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
                 for seed in range(RANDOM_DRAWS)]
        at_random = [logdet(exact.points, pairs[draw], normalize, lam) for draw in draws]
        records.append({
            "case": case.name, "normalize": normalize, "lam": lam, "picks": picks.tolist(),
            "logdet": logdet(exact.points, pairs[picks], normalize, lam),
            "logdet_random": statistics.mean(at_random),
            "logdet_random_sd": statistics.stdev(at_random),
            "largest_pairs_logdet": logdet(
                exact.points, pairs[_largest(exact.points, pairs, normalize, count)],
                normalize, lam),
        })
    return records


def _largest(points: Tensor, pairs: Tensor, normalize: Normalize, count: int) -> Tensor:
    """The pairs with the largest features: what a selection without V would take."""
    return PairFeatures(points, pairs, normalize).size.topk(count).indices


def selection(sketched: Tensor, exact: Exact, pairs: Tensor, reference: Record) -> Record:
    """The picks from sketched rows, judged by the exact rows and beside the exact picks.

    overlap: exact picks among them. ratio: log det of these picks over that of the exact picks.
    fraction: the same counted from random pairs, which have 0.
    """
    normalize, lam = reference["normalize"], reference["lam"]
    count = len(reference["picks"])
    picks = greedy_logdet(sketched, pairs, count, lam=lam, normalize=normalize,
                          show_progress=False).indices
    reached = logdet(exact.points, pairs[picks], normalize, lam)
    best, chance = reference["logdet"], reference["logdet_random"]
    return {
        "normalize": normalize, "lam": lam,
        "overlap": len(set(picks.tolist()) & set(reference["picks"])),
        "logdet": reached, "ratio": reached / best,
        "fraction": (reached - chance) / (best - chance),
    }


def describe(case: Case, exact: Exact) -> Record:
    """What the exact rows of a case are like."""
    share, column = 0.0, 0
    for name, shape in case.parameters():
        block = exact.rows[:, column:column + math.prod(shape)]
        column += math.prod(shape)
        if ".lora_A." in name:
            share += float((block.double() / exact.norms[:, None]).square().sum())
    return {
        "case": case.name, "prompts": len(case.pool), "responses": len(exact.rows),
        "pairs": len(case.pool.pairs()), "numbers_in_a_gradient": column,
        "share_of_A": share / len(exact.rows),
        "norm_quantiles": torch.quantile(
            exact.norms, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double()).tolist(),
        "rms_cosine": _size(_off_diagonal(exact.cosines))
            / math.sqrt(len(exact.rows) * (len(exact.rows) - 1)),
    }


# -- the comparison, part by part -----------------------------------------------------------------


def compare(case: Case, seeds: int, folder: Path) -> Record:
    """All records of a case: "pool", "exact", "geometry", "selection".

    A part on disk is taken if it belongs to the same pool, settings and definition of the sketch.
    """
    setting = [case.pool.fingerprint(), CRITERIA, PICKS, RANDOM_DRAWS]
    about = _Part(folder / f"{case.name}.json", setting)
    parts = {(method, seed): _Part(folder / f"{case.name}-{method}-{seed}.json", [
        *setting, DIMS, DENSE_DIM, _definition(method, seed, case.parameters())])
        for method in METHODS for seed in range(seeds)}
    missing = [key for key, part in parts.items() if part.records is None]
    if missing or about.records is None:
        exact = exact_rows(case)
        check_sketches(case, exact)
        check_points(case, exact)
        references = reference_picks(case, exact)
        about.write({"pool": [describe(case, exact)], "exact": references})
        for method, seed in tqdm(missing, desc=f"sketches, {case.name}", disable=None):
            parts[method, seed].write(_compare_sketch(case, exact, references, method, seed))
    result: Record = {}
    for part in (about, *parts.values()):
        for kind, records in (part.records or {}).items():
            result.setdefault(kind, []).extend(records)
    return result


class _Part:
    """Records on disk with the key that they were made for; None where it is another."""

    def __init__(self, path: Path, key: list[Any]) -> None:
        self._path, self._key = path, json.dumps(key)
        found = json.loads(path.read_text()) if path.exists() else {}
        self.records: Record | None = found["records"] if found.get("key") == self._key else None

    def write(self, records: Record) -> None:
        self.records = records
        _write_json(self._path, {"key": self._key, "records": records})


def _definition(method: str, seed: int, parameters: Parameters) -> str:
    """A digest that changes when a sketch of this method and seed does."""
    name, shape = parameters[0]
    # Small integers, whose sums are exact: the order of additions does not show.
    row = (torch.arange(math.prod(shape)) * 7919 % 13 - 6).float()[None]
    digest = hashlib.sha256()
    for k in DIMS:
        sketched = sketch_rows(row, [(name, shape)], Sketch(method, k, seed))
        digest.update(sketched.float().numpy().tobytes())
    return digest.hexdigest()


def _compare_sketch(case: Case, exact: Exact, references: list[Record], method: str,
                    seed: int) -> Record:
    pairs = case.pool.pairs()
    records: Record = {"geometry": [], "selection": []}
    for k, sketched in sketches_of(exact.rows, case.parameters(), method, seed):
        key = {"case": case.name, "sketch": method, "k": k, "seed": seed}
        records["geometry"].append({**key, **geometry(sketched, exact, pairs)})
        for reference in references:
            records["selection"].append({**key, **selection(sketched, exact, pairs, reference)})
    return records


# -- time -----------------------------------------------------------------------------------------


def time_sketches(case: Case) -> list[Record]:
    """Seconds that gradient rows of the pool's first items take, beside a plain forward pass.

    A forward pass goes before every measurement, and their ratio is what is to be read: the median
    over the rounds, in which all sketches take turns. The self-check, done once a pool, is not in.
    """
    tokens = case.head(TIMED_ITEMS)
    sketches = [Sketch("none"), *(Sketch(method, k) for method in METHODS for k in DIMS)]
    extractors = [case.extractor(sketch) for sketch in sketches]
    for extractor in extractors:
        extractor.check(tokens)
    forward_pass(case.model, tokens)
    extractors[0].gradients(tokens, show_progress=False)  # warm up

    seconds: list[list[tuple[float, float]]] = [[] for _ in sketches]
    turns = [(n, extractor) for _ in range(ROUNDS) for n, extractor in enumerate(extractors)]
    for n, extractor in tqdm(turns, desc="times", disable=None):
        forward = _seconds(lambda: forward_pass(case.model, tokens))
        seconds[n].append((forward, _seconds(
            lambda extractor=extractor: extractor.gradients(tokens, show_progress=False))))
    return [{
        "case": case.name, "sketch": sketch.method, "k": sketch.dim,
        "responses": len(tokens.sequences),
        "seconds": statistics.median(taken for _, taken in runs),
        "forward_seconds": statistics.median(forward for forward, _ in runs),
        "ratio": statistics.median(taken / forward for forward, taken in runs),
        "ratios": [taken / forward for forward, taken in runs],
    } for sketch, runs in zip(sketches, seconds, strict=True)]


@torch.no_grad()
def forward_pass(model: PeftModel, tokens: TokenizedPool) -> None:
    """All logits of padded sequences, the longest first, in batches of at most TOKENS tokens."""
    rows = sorted((s.input_ids for s in tokens.sequences), key=len, reverse=True)
    while rows:
        length = len(rows[0])
        batch, rows = rows[:TOKENS // length], rows[TOKENS // length:]
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(batch):
            ids[n, :len(row)] = torch.tensor(row)
            mask[n, :len(row)] = 1
        _ = model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# -- report ---------------------------------------------------------------------------------------


def summary(result: Record) -> str:
    """A table of the means over seeds, one line a case, sketch and k."""
    lines = ["case     sketch         k  seeds  product err  norm err |"
             + "".join(f"{_criterion(n, lam):>22}" for n, lam in CRITERIA) + " |  time"]
    times = {(t["sketch"], t["k"]): t["ratio"] for t in result["time"]}
    for case in CASES:
        for method in METHODS:
            for k in DIMS:
                key = {"case": case, "sketch": method, "k": k}
                shape = _where(result["geometry"], **key)
                cells = []
                for normalize, lam in CRITERIA:
                    found = _where(result["selection"], **key, normalize=normalize, lam=lam)
                    cells.append(f"{_mean(found, 'overlap'):8.1f} {_mean(found, 'ratio'):6.4f} "
                                 f"{_mean(found, 'fraction'):6.3f}")
                lines.append(
                    f"{case:<8} {method:<10} {k:5d}  {len(shape):5d}  "
                    f"{_mean(shape, 'inner_product_error'):11.4f}  "
                    f"{_mean(shape, 'norm_error'):8.4f} |" + "".join(cells)
                    + f" | {times[method, k]:5.2f}")
    return "\n".join([*lines, "cells: overlap, log det / exact, the same from random = 0"])


def draw(result: Record, path: Path) -> None:
    """Loss of log det against time, and the error of inner products against k; means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for method, marker, color in zip(METHODS, "osD", ("C0", "C1", "C2"), strict=True):
        _draw_loss(left, result, method, marker=marker, color=color)
        for case, line, fill in zip(CASES, ("--", "-"), ("white", color), strict=True):
            label = f"{method}, " + ("after one round" if case == "trained" else "B = 0")
            errors = [_mean(_where(result["geometry"], case=case, sketch=method, k=k),
                            "inner_product_error") for k in DIMS]
            right.plot(DIMS, errors, marker=marker, color=color, linestyle=line, label=label,
                       markerfacecolor=fill, linewidth=4 if method == "sjlt" else 1.5,
                       markersize=9 if method == "sjlt" else 6)  # rademacher's lie upon sjlt's

    exact = _where(result["exact"], case="trained", normalize="response", lam=1.0)[0]
    unsketched = _where(result["time"], sketch="none")[0]["ratio"]
    left.axhline(1 - exact["logdet_random"] / exact["logdet"], color="gray", linestyle="--",
                 label="random pairs")
    left.axvline(unsketched, color="gray", linestyle=":", label="time without a sketch")
    left.set(xscale="log", yscale="log", xlabel="time of gradient rows / time of a forward pass",
             ylabel="1 − log det of the picks / that of exact picks",
             title=f"{len(exact['picks'])} picks, each k (by response, λ = 1, after one round)")
    right.set(xscale="log", yscale="log", xlabel="k", ylabel="relative error",
              title="Inner products of gradient rows")
    left.margins(x=0.15)  # room for the labels of points
    _ticks(left.xaxis, [2, 3, 4, 6, 8, 10])
    _ticks(right.xaxis, DIMS)
    _ticks(right.yaxis, [0.1, 0.2, 0.3, 0.5, 1.0])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def _draw_loss(axes: Any, result: Record, method: str, **style: Any) -> None:
    """A method's loss against its time, k beside each point (sjlt's and kronecker's lie close)."""
    times = [_where(result["time"], sketch=method, k=k)[0]["ratio"] for k in DIMS]
    losses = [1 - _mean(_where(result["selection"], case="trained", sketch=method, k=k,
                               normalize="response", lam=1.0), "ratio") for k in DIMS]
    axes.plot(times, losses, label=method, **style)
    for k, at, loss in zip(DIMS, times, losses, strict=True):
        offset, side = ((-8, -3), "right") if method == "sjlt" else ((8, -1), "left")
        axes.annotate(str(k), (at, loss), textcoords="offset points", xytext=offset, ha=side,
                      fontsize=7, color=style["color"])


def _ticks(axis: Any, values: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def environment() -> Record:
    """Where and with what the figures were made."""
    packages = ("activedpo-fast", "torch", "transformers", "peft", "trl")
    return {
        "date": date.today().isoformat(), "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "activedpo_fast", "csrc")),
        "versions": {name: version(name) for name in packages}, "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else os.cpu_count(), "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent.parent, text=True,
                         capture_output=True, check=False)
    return run.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _criterion(normalize: Normalize, lam: float) -> str:
    return f"{normalize}, λ={lam:g}"


def _where(records: list[Record], **wanted: Any) -> list[Record]:
    return [r for r in records if all(r[name] == value for name, value in wanted.items())]


def _mean(records: list[Record], name: str) -> float:
    return statistics.mean(r[name] for r in records) if records else math.nan


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main(
    prompts: Annotated[int, typer.Option(min=5, help="Prompts in a pool, of 3 responses.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each sketch.")] = 3,
    out: Annotated[Path, typer.Option(help="The figures, JSON.")] = Path(
        "benchmarks/results/fidelity.json"),
    figure: Annotated[Path, typer.Option(help="The picture.")] = Path("docs/fidelity.png"),
    work: Annotated[Path, typer.Option(help="Adapter, pools, finished parts.")] = Path(
        "runs/fidelity"),
) -> None:
    """Measure what sketches cost in the quality of the selection, and what they cost in time.

    A run that was interrupted continues with what is in the work folder; delete it to start over.
    """
    torch.manual_seed(SEED)
    result: Record = {"environment": environment(), "settings": {
        "prompts": prompts, "seeds": seeds, "seed": SEED, "picks": PICKS, "kappa": 1.0,
        "criteria": CRITERIA,
        "dims": DIMS, "dense_dim_with_several_seeds": DENSE_DIM, "random_draws": RANDOM_DRAWS,
        "timed_items": TIMED_ITEMS, "rounds": ROUNDS, "max_tokens_per_batch": TOKENS,
        "model": "small", "lora": DEMO.lora, "dpo": DEMO.dpo, "generation": DEMO.generation,
        "labels": DEMO.batch_size,
    }}
    for name in CASES:
        case = prepare(name, prompts, work)
        for kind, records in compare(case, seeds, work / f"prompts-{prompts}").items():
            result.setdefault(kind, []).extend(records)
        if name == "trained":
            result["time"] = time_sketches(case)
    _write_json(out, result)
    draw(result, figure)
    print(f"{summary(result)}\n\nfigures: {out}   picture: {figure}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(epilog="Examples:\n\n"
                       "  python -m benchmarks.fidelity\n\n"
                       "  python -m benchmarks.fidelity --prompts 40 --seeds 1 "
                       "--out runs/trial.json --figure runs/trial.png")(main)
    app()
