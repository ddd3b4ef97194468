"""pair_lengths and advance of both backends against plain float64 and their documented error
bounds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import scores as score_ops
from activedpo_fast.ops.scores import ScoreState, advance, pair_lengths
from activedpo_fast.selection.eligible import Eligible
from activedpo_fast.selection.greedy import running_scores as scores_module
from activedpo_fast.selection.greedy.running_scores import RunningScores
from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.pair_features import PairFeatures
from activedpo_fast.store.rows import StoredRows
from tests.selection.test_information import exact_scores

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = ["cpp", "reference"]
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ACTIVEDPO_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_rows(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (2 * torch.rand(n, 1, generator=generator) - 1)
    return (torch.randn(n, k, generator=generator) * scale).to(dtype)


def make_pairs(n_rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(n_rows, (n, 2), generator=torch.Generator().manual_seed(seed))


def on_disk(rows: Tensor, folder: Path) -> StoredRows:
    """The same rows in three files, and in another order there."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    paths = []
    for number, part in enumerate(order.tensor_split(3)):
        paths.append(folder / f"{number}.safetensors")
        save_file({"gradients": rows[part].contiguous()}, paths[-1])
    return StoredRows.open(paths, order=order.argsort())


# -- lengths ---------------------------------------------------------------------------------------


def plain_lengths(rows: Tensor, pairs: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    rows = rows.double()
    norms = rows.square().sum(dim=1).sqrt()
    if by_row:
        rows = rows / torch.where(norms > 0, norms, 1.0)[:, None]
    used = torch.zeros(len(rows), dtype=torch.bool)
    used[pairs.flatten()] = True
    a, b = rows[pairs[:, 0]], rows[pairs[:, 1]]
    return torch.where(used, norms, 0.0), (a - b).square().sum(dim=1).sqrt()


def check_lengths(rows: Tensor, pairs: Tensor, by_row: bool) -> None:
    norms, lengths = pair_lengths(rows, pairs, by_row=by_row)
    want_norms, want_lengths = plain_lengths(rows, pairs, by_row)
    assert norms.dtype == lengths.dtype == torch.float64
    torch.testing.assert_close(norms, want_norms, rtol=1e-14, atol=0)
    torch.testing.assert_close(lengths, want_lengths, rtol=1e-14, atol=4 * EPS if by_row else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_row", [False, True])
def test_lengths_of_every_width(backend: str, dtype: torch.dtype, by_row: bool) -> None:
    for k in [*range(1, 41), 511, 512, 513, 1000]:
        rows = make_rows(23, k, dtype, seed=k)
        rows[4] = 0
        check_lengths(rows, make_pairs(21, 80, seed=k), by_row)  # rows 21 and 22 are in no pair


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    "pairs", [torch.empty(0, 2, dtype=torch.int64), torch.tensor([[2, 0]]), torch.tensor([[1, 1]])]
)
def test_lengths_of_one_pair_and_none(backend: str, pairs: Tensor, by_row: bool) -> None:
    check_lengths(make_rows(3, 5, torch.float32), pairs, by_row)


def test_lengths_of_no_rows(backend: str) -> None:
    pairs = torch.empty(0, 2, dtype=torch.int64)
    norms, lengths = pair_lengths(torch.empty(0, 4), pairs, by_row=True)
    assert norms.shape == (0,) and lengths.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_row", [False, True])
def test_the_distance_of_equal_rows_is_zero(backend: str, dtype: torch.dtype, by_row: bool) -> None:
    for k in (1, 7, 16, 33, 513):
        rows = make_rows(8, k, dtype, seed=k).repeat(2, 1)
        pairs = torch.stack([torch.arange(8), torch.arange(8, 16)], dim=1)
        assert not pair_lengths(rows, pairs, by_row=by_row)[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_of_rows_that_are_not_contiguous(backend: str, dtype: torch.dtype) -> None:
    storage = make_rows(40, 74, dtype)
    pairs = make_pairs(20, 90)
    for rows in (
        storage[::2],
        storage[:20, 3:40],
        storage[:20, ::2],
        storage.T[:20],
        storage[5:6].expand(20, -1),
        storage[:20, 7:8],
    ):
        for by_row in (False, True):
            check_lengths(rows, pairs, by_row)


def test_pairs_may_have_any_strides(backend: str) -> None:
    rows = make_rows(20, 9, torch.float32)
    pairs = make_pairs(20, 70)
    for other in (pairs.T.contiguous().T, pairs.repeat(1, 2)[:, :2], pairs.repeat(2, 1)[::2]):
        check_lengths(rows, other, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_exactly(backend: str, dtype: torch.dtype) -> None:
    """Including subnormal numbers, infinities and NaN."""
    rows = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
    pairs = torch.arange(2**16).reshape(-1, 2)
    norms, lengths = pair_lengths(rows, pairs, by_row=False)
    value = rows[:, 0].double()
    torch.testing.assert_close(norms, value.abs(), rtol=0, atol=0, equal_nan=True)
    assert norms.isfinite().sum() < 2**16 and (norms[value != 0] != 0).all()
    torch.testing.assert_close(
        lengths, (value[0::2] - value[1::2]).abs(), rtol=2e-16, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_rows_that_are_not_finite_are_refused(backend: str, dtype: torch.dtype, bad: float) -> None:
    rows = make_rows(6, 19, dtype)
    rows[5, 3] = bad
    PairFeatures(rows, torch.tensor([[0, 1]]), "response")  # row 5 is not used
    with pytest.raises(ActiveDPOError, match="not finite: 5 of 6"):
        PairFeatures(rows, torch.tensor([[0, 1], [2, 5]]), "response")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_row", [False, True])
def test_lengths_from_disk_and_with_threads_are_the_same_bits(
    dtype: torch.dtype, by_row: bool, tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "cpp")
    rows = make_rows(200, 37, dtype)
    rows[7] = 0
    # The reader keeps 16 rows per thread, placed by row number: rows 16 apart compete for one
    # place.
    apart = torch.tensor([(a, a + 16 * j) for a in range(40) for j in range(1, 9)])
    chain = torch.tensor([(a, (a + 16) % 200) for a in range(0, 200, 8)] * 3)
    mixed = torch.tensor([(a, b) for a in (3, 19, 35) for b in (19, 3, 4, 51, 3)])
    pairs = torch.cat([apart, chain, mixed, make_pairs(200, 300)])
    results = []
    for source in (rows, on_disk(rows, tmp_path)):
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            results.append(pair_lengths(source, pairs, by_row=by_row))
    for norms, lengths in results[1:]:
        assert torch.equal(norms, results[0][0]) and torch.equal(lengths, results[0][1])
    check_lengths(rows, pairs, by_row)


# -- running scores --------------------------------------------------------------------------------


class Scene:
    """A state, directions for it, and the exact scores after each number of directions."""

    def __init__(
        self,
        rows: Tensor | StoredRows,
        pairs: Tensor,
        *,
        steps: int,
        seed: int = 0,
        costs: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        features = PairFeatures(rows, pairs, ("response", "pair", None)[seed % 3])
        self.phi = features.at(torch.arange(len(pairs)))
        information = InformationMatrix(features.dim, lam=0.1)
        first = information.score(self.phi)
        weights = torch.randn(steps, len(pairs), generator=generator, dtype=torch.float64)
        self.directions = [information.add(w @ self.phi / len(pairs) ** 0.5) for w in weights]
        fall = torch.stack([(self.phi @ w).square() for w in self.directions])
        self.exact = torch.cat([first[None], first - fall.cumsum(0)])  # [1 + steps, N]
        self.inverse_cost = None
        if costs:
            self.inverse_cost = (
                4 * torch.rand(len(pairs), generator=generator, dtype=torch.float64) + 0.1
            )
        self.state = ScoreState.start(
            features.rows,
            features.pairs,
            features.row_divisor,
            features.pair_divisor,
            features.reach,
            torch.ones(len(pairs), dtype=torch.bool),
            self.inverse_cost,
            first.clone(),
            4 * EPS * first,
            steps,
        )

    def learn(self, count: int) -> None:
        for w in self.directions[self.state.count :][:count]:
            self.state.append(w, error=0.0, turn=0.0)

    def check(self, found: Tensor) -> None:
        """Check everything that `advance` promises."""
        state, everything = self.state, torch.arange(len(self.phi))
        truth = self.exact[state.version.long(), everything]
        slack = 16 * EPS * self.exact[0]  # rounding of this float64 computation
        assert ((state.score - truth).abs() <= state.error_bound + slack).all()
        assert (state.score >= 0).all() and (state.version <= state.count).all()
        scale = torch.ones(len(truth)) if self.inverse_cost is None else self.inverse_cost
        current = state.remaining & (state.version == state.count)
        upper = (state.score + state.error_bound) * scale
        best = ((state.score - state.error_bound) * scale)[current].max()
        assert found.tolist() == (current & (upper >= best)).nonzero().flatten().tolist()
        assert (upper[state.remaining & ~current] < best).all()
        now = torch.where(state.remaining, self.exact[state.count] * scale, -1.0)
        assert int(now.argmax()) in found.tolist()


@pytest.fixture(params=["kept", "not kept", "reference"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """C++ with and without keeping products for other pairs, and the reference."""
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "reference" if request.param == "reference" else "cpp")
    if request.param == "not kept":
        monkeypatch.setattr(score_ops, "_PRODUCTS_BYTES", 0)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_of_every_width(way: str, dtype: torch.dtype) -> None:
    for k in [*range(1, 41), 511, 512, 513, 1000]:
        rows = make_rows(19, k, dtype, seed=k)
        rows[4] = 0
        scene = Scene(rows, make_pairs(19, 50, seed=k), steps=11, seed=k)
        for count in (0, 1, 10):  # one direction at a time, and many
            scene.learn(count)
            scene.check(advance(scene.state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("costs", [False, True])
def test_error_bound_bounds_the_error_over_many_steps(
    way: str, dtype: torch.dtype, costs: bool
) -> None:
    """Candidates leave and come back, some are scored again, and several directions arrive at once,
    so that scores have many versions."""
    generator = torch.Generator().manual_seed(7)
    for seed in range(3):
        rows = make_rows(90, 70, dtype, seed=seed)
        rows[3] = 0
        rows[20:30] = rows[40:50]
        pairs = torch.cat(
            [
                make_pairs(90, 150, seed=seed),
                torch.stack([torch.arange(20, 30), torch.arange(40, 50)], dim=1),
            ]
        )
        scene = Scene(rows, pairs, steps=60, seed=seed, costs=costs)
        state = scene.state
        while state.count < 60:
            scene.learn(int(torch.randint(4, (), generator=generator)))
            state.remaining[:] = torch.rand(len(pairs), generator=generator) < 0.8
            found = advance(state)
            scene.check(found)
            fresh = found[:3]  # as RunningScores.refresh does
            state.score[fresh] = scene.exact[state.count, fresh].clamp(min=0)
            state.error_bound[fresh] = 8 * EPS * scene.exact[0, fresh]
        assert (state.version > 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_wait_for_many_candidates(way: str, dtype: torch.dtype) -> None:
    """More products than are kept at a time, for rows that lack different numbers of them."""
    rows = make_rows(6000, 8, dtype)
    scene = Scene(rows, make_pairs(6000, 5000), steps=700)
    scene.learn(3)
    scene.check(advance(scene.state))
    scene.learn(690)
    scene.state.score += 10  # so that all bounds are above what can be reached
    scene.exact += 10
    scene.check(advance(scene.state))
    scene.learn(7)
    scene.check(advance(scene.state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_16_bit_numbers_of_any_size(backend: str, dtype: torch.dtype) -> None:
    value = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    value = value[value.isfinite()].to(dtype)
    rows = torch.cat([value, value.new_zeros(1)])[:, None]
    pairs = torch.stack([torch.arange(len(value)), torch.full((len(value),), len(value))], dim=1)
    scene = Scene(rows, pairs, steps=1, seed=2)
    scene.learn(1)
    scene.state.remaining[:] = value == value.abs().max()  # the others wait, until the last
    for size in sorted(set(value.abs().tolist()))[::-997]:
        scene.state.remaining[:] = value.abs() <= size
        scene.check(advance(scene.state))


def test_no_candidates_and_none_left(backend: str) -> None:
    rows = make_rows(6, 5, torch.float32)
    scene = Scene(rows, make_pairs(6, 4), steps=2)
    scene.learn(1)
    scene.state.remaining[:] = False
    assert advance(scene.state).tolist() == []
    scene.state.remaining[2] = True
    assert advance(scene.state).tolist() == [2]
    scene.check(torch.tensor([2]))
    none = torch.empty(0, dtype=torch.float64)
    empty = ScoreState.start(
        rows,
        torch.empty(0, 2, dtype=torch.int64),
        torch.ones(6).double(),
        none,
        none,
        none.bool(),
        None,
        none,
        none,
        2,
    )
    empty.append(torch.ones(5).double(), error=0.0, turn=0.0)
    assert advance(empty).tolist() == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_rows_that_are_not_contiguous(backend: str, dtype: torch.dtype) -> None:
    storage = make_rows(40, 74, dtype)
    pairs = make_pairs(20, 90)
    for rows in (storage[::2], storage[:20, 3:40], storage[:20, ::2], storage.T[:20]):
        scene, packed = (Scene(x, pairs, steps=9) for x in (rows, rows.contiguous()))
        for _ in range(9):
            for each in (scene, packed):
                each.learn(1)
                each.check(advance(each.state))
        assert torch.equal(scene.state.score, packed.state.score)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [True, False])
def test_scores_from_disk_and_with_threads_are_the_same_bits(
    kept: bool, dtype: torch.dtype, tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "cpp")
    if not kept:
        monkeypatch.setattr(score_ops, "_PRODUCTS_BYTES", 0)
    rows = make_rows(333, 45, dtype)
    pairs = make_pairs(333, 700)
    results = []
    for source in (rows, on_disk(rows, tmp_path)):
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            scene = Scene(source, pairs, steps=30)
            found = []
            for count in (1, 1, 4, 1, 8, 1, 1, 13):
                scene.learn(count)
                found.append(advance(scene.state).tolist())
            state = scene.state
            results.append((found, state.score, state.error_bound, state.version, state.touched))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want) if isinstance(got, Tensor) else got == want


def test_a_file_that_was_cut_short(way: str, tmp_path: Path, threads: None) -> None:
    torch.set_num_threads(2)
    rows = make_rows(300, 45, torch.bfloat16)
    pairs = make_pairs(300, 400)
    stored = on_disk(rows, tmp_path)
    scene = Scene(stored, pairs, steps=3)
    scene.learn(1)
    scene.check(advance(scene.state))
    last = tmp_path / "2.safetensors"
    whole = last.read_bytes()
    os.truncate(last, len(whole) - 50 * stored.row_bytes - 5)
    with pytest.raises(ActiveDPOError, match="cannot be read|cut short"):
        pair_lengths(stored, pairs, by_row=True)
    scene.learn(2)
    scene.state.score += 10  # all of them have to be read
    scene.exact += 10
    with pytest.raises(ActiveDPOError, match="cannot be read|cut short"):
        advance(scene.state)
    last.write_bytes(whole)  # the state is intact: it continues where it stopped
    scene.check(advance(scene.state))


# -- together with the root of V -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "history", "lam", "batch"),
    [
        *((dtype, history, 1e-4, 2048) for dtype in DTYPES for history in (0, 20)),
        *((dtype, 0, 1.0, 2048) for dtype in DTYPES[:2]),
        *((dtype, 20, 1e-4, 7) for dtype in DTYPES[2:]),
    ],
)
def test_error_bound_bounds_the_error_of_a_selection(
    way: str,
    dtype: torch.dtype,
    history: int,
    lam: float,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compared in extended precision: the rounding of the root, and the directions that it
    changes."""
    monkeypatch.setattr(scores_module, "_BATCH", batch)
    pairs = make_pairs(120, 200)
    features = PairFeatures(make_rows(120, 40, dtype), pairs, "response")
    phi = features.at(torch.arange(len(pairs)))
    exact = phi.numpy().astype(np.longdouble)
    root = np.eye(40, dtype=np.longdouble) / np.sqrt(np.longdouble(lam))

    def add(point: np.ndarray) -> np.ndarray:
        u = root @ point
        length = np.sqrt(1 + u @ u)
        return root - np.outer(u, u @ root) / (length * (1 + length))

    for point in exact[:history]:
        root = add(point)
    information = InformationMatrix(40, lam=lam)
    information.add_many(phi[:history])
    eligible = Eligible.everything(len(pairs))
    scores = RunningScores(features, information, eligible, 60)
    truth = []
    slack = 1e4 * float(np.finfo(np.longdouble).eps) / lam * phi.square().sum(dim=1)
    for _ in range(60):
        now = ((exact @ root.T) ** 2).sum(axis=1)
        truth.append(now)
        best = scores.best()
        seen = np.stack(truth)[scores.state.version.numpy(), np.arange(len(pairs))]
        error = torch.from_numpy(np.abs(scores.state.score.numpy() - seen).astype(float))
        assert (error <= scores.state.error_bound + slack).all()
        top = torch.where(eligible.remaining, torch.from_numpy(now.astype(float)), -1.0)
        assert int(top.argmax()) in best.indices.tolist()
        # The bound is tight.
        tight = 1e-12 / lam * features.length[best.indices].square()
        assert (best.error_bound <= tight).all()
        scores.learn(int(best.indices[0]))
        eligible.record_pick(int(best.indices[0]))
        root = add(exact[best.indices[0]])


@pytest.mark.parametrize("seed", range(8))
def test_error_bound_covers_directions_that_a_dependent_pick_turned(
    backend: str, seed: int
) -> None:
    """The second pick is almost a multiple of the first: rounding turns its remainder, and so the
    other scores."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.tensor([[1, 0, 0, 0], [1, 1e-4, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 1]])
    turned = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    rows = torch.stack([phi.double() @ turned, torch.zeros(5, 4, dtype=torch.float64)], dim=1)
    features = PairFeatures(rows.flatten(0, 1), torch.arange(10).reshape(5, 2), None)
    phi = features.at(torch.arange(5))
    scores = RunningScores(features, InformationMatrix(4, lam=1e-12), Eligible.everything(5), 2)
    scores.learn(0)
    scores.learn(1)
    exact = torch.tensor(
        [float(s) for s in exact_scores(phi[:2], phi, Fraction(1e-12))], dtype=torch.float64
    )
    for index in range(2, 5):
        scores.state.remaining[:] = torch.arange(5) == index
        for fresh in (False, True):
            if fresh:
                scores.refresh(torch.tensor([index]))
            else:
                advance(scores.state)
            error_bound = scores.state.error_bound[index]
            assert (scores.state.score - exact)[index].abs() <= error_bound + 16 * EPS * exact[
                index
            ]
            assert error_bound <= 1e-9 * exact[index]
