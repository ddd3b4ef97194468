"""When the labels file is written: after every answer, as long as that is quick."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from activedpo_fast.errors import ActiveDPOError

logger = logging.getLogger(__name__)

_QUICK = 0.05  # seconds, which nobody notices
_PAUSE = 20  # times as long as a slow write: it takes less than a twentieth of the time


class LabelsWriter:
    """Writes after each change, or some time later if the file of a large batch is slow to write.

    The file has every label that there is; a write takes longer with every pair. The answers
    themselves are in the journal by then: where the file cannot be written, because the disk is
    full, a warning says so, and the next change tries again.

    Args:
        write: writes the file.
        clock: returns seconds; says how long a write takes.
    """

    def __init__(
        self, write: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._clock = clock
        self._next = 0.0  # not before, by the clock
        self._timer: asyncio.TimerHandle | None = None
        self._failing = False

    async def changed(self) -> None:
        """Write now, or see to it that the change is written later."""
        if self._timer is not None:
            return
        wait = self._next - self._clock()
        if wait > 0:
            self._timer = asyncio.get_running_loop().call_later(wait, self._write_now)
        else:
            self._write_now()

    def _write_now(self) -> None:
        self._timer = None
        begin = self._clock()
        try:
            self._write()
        except (ActiveDPOError, OSError) as error:
            if not self._failing:
                logger.warning("the answers are saved, but not yet the labels file: %s", error)
            self._failing = True
        else:
            self._failing = False
        seconds = self._clock() - begin
        self._next = begin + seconds * (1 + _PAUSE) if seconds > _QUICK else 0.0
