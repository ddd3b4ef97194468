"""Several processes that work together: an error in one is an error in all.

In a selection, each has a part of the candidates, and all get the picks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError


class LostContactError(ActiveDPOError):
    """Another of several processes is gone: it has ended, or does not answer."""


def lost_contact(error: BaseException) -> bool:
    """Return whether a collective raised this because another process is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


@dataclass(frozen=True)
class Offer:
    """A process's summary of its own best candidates.

    lower: the largest lower bound of their values. index, upper, score, quota_group,
    prompt: the lowest-numbered candidate whose upper bound reaches `lower`; the upper bound of its
    value; its score; the numbers of its quota's group and of its prompt. upper_max: the largest
    upper bound.
    """

    index: int
    score: float
    quota_group: int
    prompt: int
    lower: float
    upper: float
    upper_max: float


@dataclass(frozen=True)
class Choice:
    """The candidate that all processes pick.

    index: its number among those of all processes. score. quota_group, prompt: the numbers of its
    quota's group and of its prompt. owner: the process that has it.
    """

    index: int
    score: float
    quota_group: int
    prompt: int
    owner: int


class Processes:
    """The processes of a `torch.distributed` group, gloo or NCCL.

    Candidates of a selection are numbered consecutively, in rank order. A pick costs one gather of
    a few numbers and one broadcast of a feature. If a process fails, is lost or does not answer
    within the group's timeout, every other one raises: no process returns only a part of the picks.

    Args:
        group: the process group; `dist.group.WORLD` for all.
        n_candidates: the number of candidates of this process.
        outcome: what an error means for the work of all; the end of its message.

    Attributes:
        rank, size: in the group. offset: the number of this process's first candidate. total: the
        number of all candidates.

    Raises:
        ActiveDPOError: a process was lost.
    """

    def __init__(
        self, group: dist.ProcessGroup, n_candidates: int, outcome: str = "nothing was selected"
    ) -> None:
        self._group = group
        self._outcome = outcome
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"
        counts = self._gather([float(n_candidates)])[:, 0].long()
        self.offset = int(counts[: self.rank].sum())
        self.total = int(counts.sum())

    def require_same(self, settings: dict[str, float]) -> None:
        """Raise `ActiveDPOError`, on all processes, unless these numbers are the same on all."""
        table = self._gather(list(map(float, settings.values())))
        for name, column in zip(settings, table.T.tolist(), strict=True):
            for rank, value in enumerate(column):
                if not math.isclose(value, column[0], rel_tol=1e-9, abs_tol=1e-9):
                    raise ActiveDPOError(
                        f"processes 0 and {rank} have {name} = {column[0]:g} and "
                        f"{value:g}: they must agree"
                    )

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum over all processes, int64 [n]."""
        return self._gather(numbers.tolist()).sum(dim=0).long()

    def agree(
        self, make_offer: Callable[[], Offer | None], lowest_from: Callable[[float], Offer | None]
    ) -> Choice | None:
        """Return the candidate with the largest value, ties to the lowest number; None if none.

        Args:
            make_offer: returns this process's offer; None if it has no remaining candidate.
            lowest_from: returns the offer with the lowest-numbered of this process's candidates
                whose upper bound is at least the given value; None if there is none.

        An exception in `make_offer` is raised here and reported to the others, which raise, too.
        """
        table = self._exchange(make_offer)
        present = [r for r in range(self.size) if table[r] is not None]
        if not present:
            return None
        offers = {r: table[r] for r in present}
        threshold = max(offer.lower for offer in offers.values())
        # A process whose first candidate falls short of the others' may have a later one that does
        # not. Only then is a second exchange needed.
        if any(offer.upper < threshold <= offer.upper_max for offer in offers.values()):
            again = self._exchange(lambda: lowest_from(threshold))
            offers = {r: offer for r, offer in enumerate(again) if offer is not None}
        reaching = [r for r, offer in offers.items() if offer.upper >= threshold]
        owner = min(reaching)  # numbers increase with the rank
        chosen = offers[owner]
        return Choice(chosen.index, chosen.score, chosen.quota_group, chosen.prompt, owner)

    def share(self, vector: Tensor | None, size: int, owner: int) -> Tensor:
        """Return the owner's `vector`, float64 [size], on all processes."""
        sent = torch.empty(size, dtype=torch.float64) if vector is None else vector.cpu()
        sent = sent.to(self._device).contiguous()
        source = dist.get_global_rank(self._group, owner)
        self._call(lambda: dist.broadcast(sent, source, group=self._group))
        return sent

    def share_bytes(self, content: bytes | None, owner: int) -> bytes:
        """Return the owner's `content` on all processes; the others give None."""
        size = int(self._gather([float(len(content or b""))])[owner, 0])
        if size == 0:
            return b""
        if content is None:
            sent = torch.empty(size, dtype=torch.uint8)
        else:
            sent = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        sent = sent.to(self._device)
        source = dist.get_global_rank(self._group, owner)
        self._call(lambda: dist.broadcast(sent, source, group=self._group))
        return sent.cpu().numpy().tobytes()

    def to_first(self, rows: Tensor) -> list[Tensor]:
        """Return the `rows` [n, k] of all processes in the first one, and no others anywhere else.

        n may differ, the dtype may not; k has no meaning where n is 0.
        """
        shapes = self._gather([float(len(rows)), float(rows.shape[1])]).long().tolist()
        if self.rank > 0:
            if len(rows):
                sent = rows.contiguous().view(torch.uint8).to(self._device)
                first = dist.get_global_rank(self._group, 0)
                self._call(lambda: dist.send(sent, first, group=self._group))
            return []
        return [rows] + [
            self._receive(rank, count, width, rows.dtype)
            for rank, (count, width) in enumerate(shapes)
            if rank > 0
        ]

    def _receive(self, rank: int, count: int, width: int, dtype: torch.dtype) -> Tensor:
        if count == 0:
            return torch.empty(0, width, dtype=dtype)
        got = torch.empty(count, width * dtype.itemsize, dtype=torch.uint8, device=self._device)
        source = dist.get_global_rank(self._group, rank)
        self._call(lambda: dist.recv(got, source, group=self._group))
        return got.cpu().view(dtype)

    def check(self, prepare: Callable[[], Any]) -> Any:
        """Return the result of `prepare` if it succeeds everywhere.

        Its own exception is raised where it fails, an `ActiveDPOError` elsewhere; `said_by` of each
        is the first process that has failed.
        """
        result: list[Any] = []
        self._exchange(lambda: result.append(prepare()))
        return result[0]

    def _exchange(self, make: Callable[[], Offer | None]) -> list[Any]:
        error: BaseException | None = None
        offer = None
        try:
            offer = make()
        except Exception as raised:  # noqa: BLE001 - reported to the others first, then reraised
            error = raised
        numbers = [0.0] * len(fields(Offer)) if offer is None else list(map(float, astuple(offer)))
        if offer is not None:
            numbers[0] += self.offset
        table = self._gather([float(error is not None), float(offer is not None), *numbers])
        failed = table[:, 0].nonzero().flatten().tolist()
        if failed:
            if error is None:
                error = ActiveDPOError(
                    f"process {failed[0]} of {self.size} failed, see its own error; {self._outcome}"
                )
            error.said_by = failed[0]  # type: ignore[attr-defined]
            raise error
        return [
            Offer(int(row[2]), row[3], int(row[4]), int(row[5]), *row[6:]) if row[1] else None
            for row in table.tolist()
        ]

    def _gather(self, numbers: list[float]) -> Tensor:
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        everybody = list(
            torch.empty(self.size, len(numbers), dtype=torch.float64, device=self._device)
        )
        self._call(lambda: dist.all_gather(everybody, mine, group=self._group))
        return torch.stack(everybody).cpu()

    def _call(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:  # raised by gloo and NCCL, including timeouts
            raise LostContactError(
                f"lost contact with another of the {self.size} processes; {self._outcome}"
            ) from error
