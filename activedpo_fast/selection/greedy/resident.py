"""Greedy log-det selection by a grid that stays on the device for many picks (csrc/greedy/)."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.ops import backends
from activedpo_fast.ops.layout import rows_together
from activedpo_fast.ops.scores import DTYPES
from activedpo_fast.progress import progress_bar
from activedpo_fast.selection.eligible import Eligible, Limit
from activedpo_fast.selection.greedy.running_scores import first_scores, root_error
from activedpo_fast.selection.information.matrix import InformationMatrix
from activedpo_fast.selection.pair_features import PairFeatures
from activedpo_fast.selection.ranking import Ranking

log = logging.getLogger(__name__)


class Pace(NamedTuple):
    """How many picks a launch makes: so many at first, and then what takes some seconds.

    The time of a pick is known only by waiting. Nothing can stop a launch, and a display's GPU ends
    one that takes too long.
    """

    first: int = 16
    seconds: float = 0.2

    def next(self, picks: int, took: float) -> int:
        """Return the number of picks after so many in `took` seconds."""
        return int(min(4 * picks, max(1, picks * self.seconds / max(took, 1e-6))))


PACE = Pace()


@dataclass
class ResidentProblem:
    """GreedyProblem of csrc/greedy/problem.h as tensors on one device; None is a null pointer.

    The names are those of that file.
    """

    n_candidates: int
    dim: int
    rows: Tensor
    row_stride: int
    pairs: Tensor
    row_divisor: Tensor
    pair_divisor: Tensor
    reach: Tensor
    size: Tensor
    score: Tensor
    error_bound: Tensor
    left: Tensor
    inverse_cost: Tensor | None
    prompt: Tensor | None
    prompt_room: Tensor | None
    group: Tensor | None
    group_room: Tensor | None
    min_score: float
    forced: Tensor
    n_forced: int
    root_norm: float
    root_error: float
    base: Tensor | None
    directions: Tensor
    pulled: Tensor
    n_before: int
    rounds: bool
    n_picks: int
    picks: Tensor
    scores: Tensor
    touched: Tensor
    count: Tensor

    @classmethod
    def of(
        cls,
        features: PairFeatures,
        information: InformationMatrix,
        eligible: Eligible,
        n: int,
        show_progress: bool | None = False,
    ) -> ResidentProblem:
        """Return the problem of n picks from `features`, in memory, on `features.device`."""
        rows = _rows_in_memory(features, n)
        place = partial(_copy, device=features.device)
        score, error_bound = first_scores(features, information, show_progress)
        by_prompt, by_quota_group = eligible.limits()
        prompt, prompt_room = _limit(by_prompt, features.device)
        group, group_room = _limit(by_quota_group, features.device)
        forced = torch.tensor(_draws(eligible, n), dtype=torch.int64)
        base, directions, pulled = information.factors()
        cost = eligible.inverse_cost
        outputs = partial(torch.empty, n, device=features.device)
        return cls(
            n_candidates=len(features),
            dim=features.dim,
            rows=rows,
            row_stride=rows.stride(0),
            pairs=place(features.pairs, torch.int64),
            row_divisor=place(features.row_divisor),
            pair_divisor=place(features.pair_divisor),
            reach=place(features.reach),
            size=place(features.size),
            score=place(score),
            error_bound=place(error_bound),
            left=place(eligible.remaining, torch.uint8),
            inverse_cost=None if cost is None else place(cost),
            prompt=prompt,
            prompt_room=prompt_room,
            group=group,
            group_room=group_room,
            min_score=eligible.min_score,
            forced=place(forced, torch.int64),
            n_forced=len(forced),
            root_norm=math.sqrt(information.kappa / information.lam),
            root_error=root_error(information),
            base=None if base is None else base.to(features.device).contiguous(),
            directions=_with_room(directions, n, features.device),
            pulled=_with_room(pulled, n, features.device),
            n_before=len(directions),
            rounds=information.count > 0,
            n_picks=n,
            picks=outputs(dtype=torch.int64),
            scores=outputs(dtype=torch.float64),
            touched=outputs(dtype=torch.int64),
            count=torch.zeros(1, dtype=torch.int64, device=features.device),
        )

    def run(
        self,
        show_progress: bool | None = False,
        *,
        module: ModuleType,
        pace: Pace = PACE,
        **where: int,
    ) -> None:
        """Make the picks by an extension module's `greedy_select_*`, called with `where`.

        The picks do not depend on the pace.
        """
        dtype = DTYPES[self.rows.dtype]
        problem = module.GreedyProblem(
            **{field.name: _address(getattr(self, field.name)) for field in fields(self)}
        )
        room = torch.empty(
            getattr(module, f"greedy_bytes_{dtype}")(problem),
            dtype=torch.uint8,
            device=self.rows.device,
        )
        launch = getattr(module, f"greedy_select_{dtype}")
        begin, count, picks = 0, 0, pace.first
        with progress_bar(show_progress, total=self.n_picks, desc="selecting", unit="pair") as bar:
            while count == begin < self.n_picks:
                end = min(begin + picks, self.n_picks)
                started = time.perf_counter()
                launch(problem, room=room.data_ptr(), begin=begin, end=end, **where)
                count = int(self.count)  # waits for it
                bar.update(count - begin)
                picks = pace.next(end - begin, time.perf_counter() - started)
                begin = end  # there are fewer picks if no candidate is left


def picks_there(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a grid on `device` makes the picks from rows that are there."""
    return backends.choose("greedy_select", device.type, dtype) == "cuda"


def at_its_place(rows: Tensor, device: torch.device, *, alone: bool = True) -> Tensor:
    """Return rows in memory where their picks are quickest.

    That is `device`, if a grid makes the picks there and it has room for the rows and as much again
    for the other data of the picks. Rows that are on a GPU but have no such grid go to the CPU,
    where a pick reads a few of them: on a GPU it would read all.

    Args:
        alone: whether this process selects alone. Several agree on each pick, on the CPU.
    """
    if device.type != "cuda":
        return rows
    if not (alone and picks_there(device, rows.dtype)):
        if rows.is_cuda and backends.choose("advance", "cpu", rows.dtype) == "cpp":
            log.info("rows go to the CPU, where each pick reads a few of them instead of all")
            return rows.cpu()
        return rows
    if rows.device == device:
        return rows
    free, _ = torch.cuda.mem_get_info(device)
    # What PyTorch keeps of freed tensors is free to it, and to nobody else.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return rows.to(device) if 2 * rows.numel() * rows.element_size() < free else rows


def greedy_resident(
    features: PairFeatures,
    information: InformationMatrix,
    eligible: Eligible,
    n: int,
    run: Callable[[ResidentProblem, bool | None], None],
    show_progress: bool | None = False,
) -> Ranking:
    """Run `greedy_logdet` by a resident grid: the same picks, for rows in memory and one process.

    Args:
        features: the candidates. All their tensors except the rows are copied to the rows' device.
            information: V_0; it is not changed. eligible: it is used up.
        n: number of picks, 0 to N. Memory on the device: about n (20 k + 256) + 300 N bytes; plus
            k^2 float64 numbers if `information` is explicit and on another device.
        run: makes the picks: `on_gpu`, for rows on a GPU.
        show_progress: bars over first scores and picks.

    Raises:
        ActiveDPOError: rows on disk, a score that is not finite.
    """
    problem = ResidentProblem.of(features, information, eligible, n, show_progress)
    if n > 0:
        run(problem, show_progress)
    count = int(problem.count)
    picks, scores, touched = (
        x[:count].cpu() for x in (problem.picks, problem.scores, problem.touched)
    )
    for index in picks.tolist():
        eligible.record_pick(index)
    return Ranking(picks, scores, touched)


def on_gpu(problem: ResidentProblem, show_progress: bool | None = False) -> None:
    """Make the picks on the GPU of the problem's rows, on PyTorch's current stream.

    Raises:
        ActiveDPOError: the kernel does not fit the device, does not start or fails.
    """
    from activedpo_fast import _cuda

    device = problem.rows.device
    stream = torch.cuda.current_stream(device).cuda_stream
    try:
        problem.run(show_progress, module=_cuda, device=device.index, stream=stream)
    except RuntimeError as error:
        raise ActiveDPOError(f"the selection failed on {device}: {error}") from None


def _rows_in_memory(features: PairFeatures, n: int) -> Tensor:
    """Return the rows, each contiguous; raise if a grid cannot make n picks from them."""
    rows = features.rows
    if not isinstance(rows, Tensor):
        raise ActiveDPOError("rows on disk cannot be selected from on a GPU")
    if len(features) >= 2**31 or n >= 2**31:
        raise ActiveDPOError("2^31 candidate pairs or more cannot be selected from on a GPU")
    return rows_together(rows.detach())


def _copy(values: Tensor, dtype: torch.dtype = torch.float64, *, device: torch.device) -> Tensor:
    # Always a copy: some of them are changed.
    return values.to(device, dtype, copy=True).contiguous()


def _limit(given: Limit | None, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if given is None:
        return None, None
    return (
        _copy(given.numbers, torch.int32, device=device),
        _copy(given.room, torch.int32, device=device),
    )


def _with_room(begun: Tensor, n: int, device: torch.device) -> Tensor:
    """Return rows [t, k] with uninitialized room for n more, float64 [t + n, k]."""
    whole = torch.empty(len(begun) + n, begun.shape[1], dtype=torch.float64, device=device)
    whole[: len(begun)] = begun
    return whole


def _draws(eligible: Eligible, n: int) -> list[int]:
    """Return the random picks: the candidates that come first in the random order."""
    count = min(n, eligible.n_random)
    if count == 0:
        return []
    assert eligible.random_order is not None
    allowed = copy.deepcopy(eligible)
    drawn: list[int] = []
    for index in eligible.random_order.argsort().tolist():
        if len(drawn) == count:
            break
        if allowed.remaining[index]:
            allowed.record_pick(index)
            drawn.append(index)
    return drawn


def _address(value: Any) -> Any:
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, Tensor) else value
