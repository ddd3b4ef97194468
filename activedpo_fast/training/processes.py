"""The processes of a run: the first has its folder, and all compute together."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from activedpo_fast.distributed.pool_parts import PoolProcesses, Result
from activedpo_fast.distributed.processes import LostContactError
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import LabelsPending

# What an error means for the work of several processes.
KEPT = "stages that were complete are kept"

_ANOTHER = -1  # `said_by` of an error that no process says


class RunProcesses(PoolProcesses):
    """The processes of a run.

    The first reads and writes the run's folder, asks for labels and evaluates. What it finds or
    raises, the others are told. All of them generate, select and train.

    Args:
        group: see `PoolProcesses`. Its timeout has to be longer than labeling may take.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group, KEPT)

    def by_first(self, act: Callable[[], object]) -> None:
        """Do something in the first process alone; the others wait.

        Raises:
            LabelsPending: in all processes, if labels are missing.
        """
        pending: list[LabelsPending] = []

        def attempt() -> None:
            try:
                act()
            except LabelsPending as error:
                pending.append(error)

        self.check(lambda: attempt() if self.rank == 0 else None)
        told = self.bytes_of_first(lambda: str(pending[0]).encode() if pending else b"")
        if told:
            error = pending[0] if pending else LabelsPending(told.decode())
            error.said_by = 0
            raise error

    def in_first_alone(self, compute: Callable[[], Result]) -> Result | None:
        """Return what `compute` returns in the first process; None in the others, which wait."""
        return self.check(lambda: compute() if self.rank == 0 else None)

    def lacks(self, path: Path) -> bool:
        """Return whether a file or folder is not there, as the first process sees it."""
        return any(self.of_first(lambda: [not path.exists()]))

    @contextmanager
    def file_of_first(self, path: Path, check: Callable[[], object]) -> Iterator[Path]:
        """Yield the path of a file in the first process, and in the others that of a copy.

        Args:
            check: called in the first process, before the file is read.
        """
        if self.group is None:
            check()
            yield path
            return

        def content() -> bytes:
            check()
            return path.read_bytes()

        sent = self.bytes_of_first(content)
        if self.rank == 0:
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="activedpo-") as folder:
            copy = Path(folder) / path.name
            copy.write_bytes(sent)
            yield copy

    def require_same_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise `ActiveDPOError`, on all processes, unless all were given the same settings."""
        try:
            self.require_same(
                {name: json.dumps(value, sort_keys=True) for name, value in settings.items()}
            )
        except ActiveDPOError as error:
            error.said_by = 0  # all raise it
            raise

    @contextmanager
    def one_says_it(self) -> Iterator[None]:
        """Let one process say an error that ends all, of which the others were not told.

        Such an error happens where the processes communicate by other means, as in training: then
        the others find that this process is gone. The one whose own error it is has to say it.
        """
        try:
            yield
        except Exception as error:
            if self.group is not None and "said_by" not in vars(error):
                own = not isinstance(error, LostContactError)
                error.said_by = self._speaker(self.group, own)  # type: ignore[attr-defined]
            raise

    def _speaker(self, group: dist.ProcessGroup, own: bool) -> int:
        try:
            earlier = group.get_group_store().add("errors said", int(own)) - int(own)
        except RuntimeError:  # the process that has the store is gone
            earlier = 0
        if earlier:
            return _ANOTHER
        return self.rank if own else 0
