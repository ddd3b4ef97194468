"""Greedy log-det selection compared with other implementations, on real gradient rows.

    python -m benchmarks.selection --help

The library and its alternatives (`peers.py`) select from rows of the demo's policy (`pools.py`):
all of them at one point, and the library and the Sherman-Morrison loop along N, k and B, with
fitted exponents. The last part is a round of the paper's size, with a history of labeled pairs,
next to the estimated rest of that round (`paper.py`).

Rows and measured points are kept in the work folder, so that an interrupted run continues; a point
is measured again when the code of the selection has changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import typer
from torch import Tensor
from tqdm.auto import tqdm

from activedpo_fast._files import write_atomic
from activedpo_fast.selection.pair_features import Normalize
from benchmarks.fidelity.cases import environment
from benchmarks.rows.measure import peak_memory, seconds
from benchmarks.selection.figures import draw
from benchmarks.selection.paper import paper_round
from benchmarks.selection.peers import (
    OURS,
    SHERMAN_MORRISON,
    Contender,
    Problem,
    check,
    contenders,
    logdet,
    rank,
)
from benchmarks.selection.pools import PARTS, RESPONSES, Rows, load
from benchmarks.selection.tables import selection_tables

Record = dict[str, Any]
ROUNDS = 5
NORMALIZATIONS: tuple[Normalize, ...] = ("response", "pair", None)
GROWTH_NORMALIZATIONS: tuple[Normalize, ...] = ("response", None)
SMALL_LAM = 0.01


@dataclass(frozen=True)
class Point:
    """A selection of `picks` of `pairs` candidates, from rows of k numbers."""

    pairs: int
    k: int
    picks: int
    responses: int
    normalize: Normalize = "response"
    lam: float = 1.0
    history: int = 0


@dataclass(frozen=True)
class Plan:
    """The measurements.

    base: the point that all contenders are measured at, and that axes go through.
    pairs, dims, picks: the axes; that of the pairs has RESPONSES responses per prompt at every
    point,
        or else the number of rows would not grow as the number of pairs.
    others: points besides, largest and smallest.
    paper: the paper's round.
    parts: of the pool. budget: seconds that a contender is repeated for, at least once.
    """

    base: Point
    pairs: tuple[int, ...]
    dims: tuple[int, ...]
    picks: tuple[int, ...]
    others: tuple[Point, ...]
    paper: Point
    parts: int
    budget: float

    def axes(self) -> dict[str, list[Point]]:
        """The points of each axis, for one normalization."""
        return {
            "N": [replace(self.base, pairs=n, responses=RESPONSES) for n in self.pairs],
            "k": [replace(self.base, k=k) for k in self.dims],
            "B": [replace(self.base, picks=b) for b in self.picks],
        }


FULL = Plan(
    base=Point(10_000, 4096, 300, 3),
    pairs=(3_000, 10_000, 30_000, 100_000),
    dims=(1024, 2048, 4096, 8192),
    picks=(50, 100, 300, 1000),
    others=(
        Point(3_000, 1024, 50, 3),
        Point(3_000, 4096, 300, 3),
        Point(100_000, 8192, 1000, RESPONSES),
    ),
    paper=Point(3_000, 8192, 50, 3, history=2_000),
    parts=PARTS,
    budget=20.0,
)
QUICK = Plan(
    base=Point(300, 512, 20, 3),
    pairs=(300, 1_000, 3_000),
    dims=(256, 512, 1024),
    picks=(5, 20, 50),
    others=(Point(2_000, 1024, 50, RESPONSES),),
    paper=Point(150, 1024, 10, 3, history=100),
    parts=1,
    budget=0.2,
)
FEW = 100  # picks of the Sherman-Morrison loop at points where all picks would take minutes
LONG = 5e11  # numbers that it reads or writes at such a point


class Points:
    """Measure points, or read them from disk if the same code has measured them."""

    def __init__(self, rows: Rows, folder: Path, budget: float) -> None:
        self._rows, self._folder, self._budget = rows, folder, budget
        self._code = _digest_of_code()

    def __call__(
        self, point: Point, compared: Sequence[Contender], memory: bool = False
    ) -> list[Record]:
        """One record per contender."""
        key = [asdict(point), [c.name for c in compared], memory, self._budget, self._code]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        path = self._folder / f"{name}.json"
        if not path.exists():
            _write_json(path, self._measure(self._problem(point), point, compared, memory))
        return json.loads(path.read_text())

    def _problem(self, point: Point) -> Problem:
        rows, pairs = self._rows.problem(point.pairs, point.k, point.responses)
        history = None
        if point.history:
            prompts = len(rows) // point.responses
            history = self._rows.problem(point.history, point.k, 2, first_prompt=prompts)
        return Problem(rows, pairs, point.normalize, point.lam, history)

    def _measure(
        self, problem: Problem, point: Point, compared: Sequence[Contender], memory: bool
    ) -> list[Record]:
        def reading() -> float:
            return statistics.median(seconds(problem.rows.sum) for _ in range(3))

        reading()
        compared = [_for_size(c, point) for c in compared]
        ranking = rank(problem, point.picks)  # the first warm-up
        for contender in compared[1:]:
            contender.select(problem, 1)
        found = [_Times(c, point.picks) for c in compared]
        for _ in range(ROUNDS):
            due = [times for times in found if times.spent < self._budget]
            if any(times not in due for times in found[:2]):
                break  # ratios are of one round
            for times in due:
                times.add(reading(), problem)
        loop = next(t for t in found if t.contender.name == SHERMAN_MORRISON.name)
        reference = logdet(problem, ranking.indices)
        records = []
        for times in found:
            picks = times.picks
            records.append(
                {
                    **asdict(point),
                    **times.record(loop),
                    "leading": _leading(picks, ranking.indices),
                    "common": len(set(picks.tolist()) & set(ranking.indices.tolist())),
                    "logdet_ratio": logdet(problem, picks) / reference
                    if len(picks) == point.picks
                    else None,
                    "peak_mib": peak_memory(
                        partial(times.contender.select, problem, times.contender.few or point.picks)
                    )
                    if memory
                    else None,
                }
            )
        touched = getattr(ranking, "touched", None)
        records[0]["touched"] = (
            None if touched is None else (float(touched.sum()) / (point.picks * len(problem.rows)))
        )
        return records


class _Times:
    """The rounds of one contender at one point."""

    def __init__(self, contender: Contender, n: int) -> None:
        self.contender = contender
        self._n = n
        self._first: list[float] = []  # seconds of a selection of one pick
        self._few: list[float] = []  # of one of `few` picks
        self._all: list[float] = []  # of one of n; extrapolated if few
        self._read: list[float] = []
        self.spent = 0.0
        self.picks = torch.zeros(0, dtype=torch.int64)

    def add(self, read: float, problem: Problem) -> None:
        def select(count: int) -> float:
            return seconds(lambda: setattr(self, "picks", self.contender.select(problem, count)))

        few = self.contender.few
        first = select(1) if few or not self._first else 0.0
        taken = select(few or self._n)
        if first:
            self._first.append(first)
        each = (taken - first) / (few - 1) if few else 0.0
        self._all.append(first + each * (self._n - 1) if few else taken)
        self._read.append(read)
        self.spent += taken + first

    def record(self, loop: _Times) -> Record:
        """`loop`: the contender that it is compared with, whose rounds began at the same times."""
        return {
            "contender": self.contender.name,
            "seconds": statistics.median(self._all),
            "first_pick_seconds": statistics.median(self._first),
            "measured_picks": self.contender.few or self._n,
            "rounds": len(self._all),
            "read_seconds": statistics.median(self._read),
            "readings": statistics.median(
                a / r for a, r in zip(self._all, self._read, strict=True)
            ),
            "speedup": statistics.median(b / a for a, b in zip(self._all, loop._all, strict=False)),
        }


def _for_size(contender: Contender, point: Point) -> Contender:
    """The loop, measured on few picks where all picks would take minutes."""
    numbers = point.picks * point.k * (point.pairs + 3 * point.k)
    if contender.name == SHERMAN_MORRISON.name and numbers > LONG:
        return replace(contender, few=FEW)
    return contender


def _leading(picks: Tensor, wanted: Tensor) -> int:
    """The number of leading picks that are the same."""
    same = picks == wanted[: len(picks)]
    return int(same.int().cumprod(0).sum())


def measure(plan: Plan, rows: Rows, folder: Path) -> Record:
    """All records: "contenders", "growth", "others", "lam", "paper", and fitted "exponents"."""
    points = Points(rows, folder, plan.budget)
    pair = [OURS, SHERMAN_MORRISON]
    result: Record = {"contenders": [], "growth": [], "others": [], "lam": [], "exponents": []}
    bar = tqdm(NORMALIZATIONS, desc="contenders", disable=None)
    for normalize in bar:
        at = replace(plan.base, normalize=normalize)
        every = [c for c in contenders() if at.pairs <= (c.most_pairs or at.pairs)]
        result["contenders"] += points(at, every, memory=normalize == "response")
        result["lam"] += points(replace(at, lam=SMALL_LAM), pair)
    for normalize in tqdm(GROWTH_NORMALIZATIONS, desc="growth", disable=None):
        for axis, line in plan.axes().items():
            found = [
                {"axis": axis, **record}
                for point in line
                for record in points(replace(point, normalize=normalize), pair)
            ]
            result["growth"] += found
            result["exponents"] += [
                {
                    "axis": axis,
                    "normalize": normalize,
                    "contender": contender.name,
                    "exponent": exponent(found, axis, contender.name),
                }
                for contender in pair
            ]
        for point in plan.others:
            result["others"] += points(replace(point, normalize=normalize), pair)
    result["paper"] = points(plan.paper, [c for c in contenders() if c.takes_history])
    result["paper_round"] = paper_round()
    return result


def exponent(records: Sequence[Record], axis: str, contender: str) -> float:
    """b of seconds ~ a x^b, by least squares in logarithms."""
    field = {"N": "pairs", "k": "k", "B": "picks"}[axis]
    own = [r for r in records if r["contender"] == contender]
    x = torch.tensor([math.log(r[field]) for r in own])
    y = torch.tensor([math.log(r["seconds"]) for r in own])
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x @ x))


def _digest_of_code() -> str:
    """A digest of everything that the times depend on, except the machine."""
    root = Path(__file__).parents[2]
    patterns = (
        "activedpo_fast/selection/**/*.py",
        "activedpo_fast/ops/*.py",
        "csrc/**/*.*",
        *(f"benchmarks/selection/{part}.py" for part in ("__main__", "peers", "pools")),
    )
    files = [file for pattern in patterns for file in root.glob(pattern)]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Everything in small, within two minutes, into the work folder."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The figures, JSON.  [default: benchmarks/results/selection.json]"),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="The picture.  [default: docs/selection_growth.png]")
    ] = None,
    work: Annotated[Path, typer.Option(help="Rows and measured points.")] = Path("runs/selection"),
    adapter: Annotated[Path, typer.Option(help="The work folder of `benchmarks.fidelity`.")] = Path(
        "runs/fidelity"
    ),
) -> None:
    """Compare the selection with other implementations, and measure how its time grows.

    A run that was interrupted continues with what is in the work folder; delete it to start over.
    """
    torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
    plan = QUICK if quick else FULL
    rows = load(work / "pool", adapter, plan.parts)
    small, pairs = rows.problem(90, 256, 3)
    check(Problem(small, pairs, None, 1.0, rows.problem(30, 256, 2, first_prompt=30)), 20)
    result = {
        "environment": environment(),
        "settings": {"plan": asdict(plan), "rounds": ROUNDS, "lam": SMALL_LAM},
        **measure(plan, rows, work / "points"),
    }
    out = out or (work / "quick.json" if quick else Path("benchmarks/results/selection.json"))
    figure = figure or (work / "quick.png" if quick else Path("docs/selection_growth.png"))
    _write_json(out, result)
    draw(result, figure)
    tables = "\n\n".join(selection_tables(result).values())
    print(f"{tables}\n\nfigures: {out}   picture: {figure}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(
        epilog="Examples:\n\n"
        "  python -m benchmarks.selection\n\n"
        "  python -m benchmarks.selection --quick"
    )(main)
    app()
