"""A pool split over several processes: each one's part, and the inputs all must share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from hashlib import blake2b
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from activedpo_fast.distributed.processes import Processes
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool

Result = TypeVar("Result")


class PoolPart(NamedTuple):
    """A contiguous part of a pool: positions of its items, and numbers of their response rows."""

    items: range
    rows: range

    def pairs(self, pairs: Tensor) -> range:
        """Return which of the pool's pairs, int64 [N, 2] in pool order, are in this part."""
        ends = torch.tensor([self.rows.start, self.rows.stop])
        return range(*torch.searchsorted(pairs[:, 0].contiguous(), ends).tolist())

    def item_of_row(self, pool: PreferencePool) -> Tensor:
        """Return the item of each response row, both counted from this part's start; int64."""
        counts = pool.response_offsets.diff()[self.items.start : self.items.stop]
        return torch.repeat_interleave(torch.arange(len(self.items)), counts)


class PoolProcesses:
    """The processes of a `torch.distributed` group, gloo or NCCL, that share a pool.

    All of them call the same methods in the same order. Computations on a single part go through
    `check`, so that an error in one process is an error in all.

    Args:
        group: `dist.group.WORLD` for all processes; None for a single process, which has the whole
            pool.
        outcome: see `Processes`.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, outcome: str = "nothing was selected"
    ) -> None:
        self.group = group
        self._processes = None if group is None else Processes(group, 0, outcome)
        self.rank = 0 if self._processes is None else self._processes.rank
        self.size = 1 if self._processes is None else self._processes.size

    def part(self, pool: PreferencePool) -> PoolPart:
        """Return this process's part: as many responses as the others, as far as items allow.

        Raises:
            ActiveDPOError: fewer items than processes.
        """
        if len(pool) < self.size:
            raise ActiveDPOError(
                f"{self.size} processes cannot share a pool of {len(pool)} "
                "prompts: each needs one or more"
            )
        offsets = pool.response_offsets
        bounds = [0]
        for rank in range(1, self.size):
            near = int(torch.searchsorted(offsets, pool.n_responses * rank // self.size))
            bounds.append(min(max(near, bounds[-1] + 1), len(pool) - (self.size - rank)))
        bounds.append(len(pool))
        first, end = bounds[self.rank], bounds[self.rank + 1]
        return PoolPart(range(first, end), range(int(offsets[first]), int(offsets[end])))

    def stretch(self, count: int) -> slice:
        """Return this process's part of `count` tasks of equal cost; may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def check(self, compute: Callable[[], Result]) -> Result:
        """Return the result of `compute` if it succeeds everywhere; it must not communicate."""
        return compute() if self._processes is None else self._processes.check(compute)

    def of_first(self, compute: Callable[[], Sequence[int]]) -> list[int]:
        """Return, everywhere, the numbers that `compute` gives in the first process."""
        found = self.check(lambda: compute() if self.rank == 0 else ())
        return self.gather(torch.tensor(found, dtype=torch.int64)).tolist()

    def bytes_of_first(self, compute: Callable[[], bytes]) -> bytes:
        """Return, everywhere, the bytes that `compute` gives in the first process."""
        found = self.check(lambda: compute() if self.rank == 0 else None)
        return found or b"" if self._processes is None else self._processes.share_bytes(found, 0)

    def texts_of_all(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the texts of each process, in rank order."""
        if self._processes is None:
            return [list(texts)]
        mine = json.dumps(texts).encode()
        shared = [
            self._processes.share_bytes(mine if owner == self.rank else None, owner)
            for owner in range(self.size)
        ]
        return [json.loads(content) for content in shared]

    @contextmanager
    def in_first(self, enter: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Enter the context that `enter` returns in the first process, as `check` does."""
        with ExitStack() as stack:
            self.check(lambda: stack.enter_context(enter()) if self.rank == 0 else None)
            yield

    def total(self, count: int) -> int:
        """Return the sum of a number over all processes."""
        return count if self._processes is None else int(self._processes.sum(torch.tensor([count])))

    def to_first(self, rows: Tensor) -> list[Tensor]:
        """Return the rows of all processes in the first one; see `Processes.to_first`."""
        return [rows] if self._processes is None else self._processes.to_first(rows)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in rank order; their number may differ, not their shape.

        They are sent as float64 and returned in their own dtype, on the CPU if there is more than
        one process.
        """
        if self._processes is None:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        parts = []
        for owner, count in enumerate(self._processes.sum(counts).tolist()):
            shape = (count, *rows.shape[1:])
            if count:
                mine = rows.to(torch.float64).flatten() if owner == self.rank else None
                sent = self._processes.share(mine, torch.Size(shape).numel(), owner)
                parts.append(sent.cpu().to(rows.dtype).view(shape))
        return torch.cat(parts) if parts else rows.cpu()

    def require_same(
        self, given: Mapping[str, str], numbers: Mapping[str, float] | None = None
    ) -> None:
        """Raise `ActiveDPOError`, on all processes, unless all have the same texts and numbers."""
        if self._processes is None:
            return
        mine = torch.tensor([_digest(text) for text in given.values()], dtype=torch.float64)
        first = self._processes.share(mine if self.rank == 0 else None, len(mine), 0).cpu()
        differs = torch.zeros(self.size, len(mine), dtype=torch.int64)
        differs[self.rank] = first != mine
        table = self._processes.sum(differs.flatten()).view(self.size, -1)
        for rank, column in table.nonzero().tolist():
            raise ActiveDPOError(
                f"process {rank} has another {list(given)[column]} than process "
                "0: all must be given the same"
            )
        if numbers:
            self._processes.require_same(dict(numbers))


def _digest(text: str) -> int:
    """Return a 48-bit hash, which float64 represents exactly."""
    return int.from_bytes(blake2b(text.encode(errors="replace"), digest_size=6).digest(), "big")
