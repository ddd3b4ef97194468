"""The labels file is written after every answer, except where that would take all the time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.page import writing
from activedpo_fast.labels.page.writing import LabelsWriter


class _Clock:
    """Seconds that pass only when a test says so: a write takes as long on any machine."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(writing, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_a_quick_write_follows_every_change(clock: _Clock) -> None:
    written: list[int] = []
    writer = LabelsWriter(lambda: written.append(1))

    async def changes() -> None:
        for n in range(5):
            await writer.changed()
            assert len(written) == n + 1

    asyncio.run(changes())


def test_a_slow_write_comes_later_and_once_for_many_changes(clock: _Clock) -> None:
    state, written = 0, []

    def write() -> None:
        clock.now += 0.06
        written.append(state)

    writer = LabelsWriter(write)

    async def changes() -> None:
        nonlocal state
        begin = asyncio.get_running_loop().time()
        for _ in range(50):
            state += 1
            await writer.changed()
        assert written == [1]  # and nobody has waited for more
        async with asyncio.timeout(60):
            while len(written) < 2:
                await asyncio.sleep(0.01)
        assert written == [1, 50]  # the last change is not forgotten
        assert asyncio.get_running_loop().time() - begin > 1.1  # 20 times as long as a write

    asyncio.run(changes())


def test_a_write_that_fails_is_said_once_and_tried_again(
    clock: _Clock, caplog: pytest.LogCaptureFixture
) -> None:
    full, written = True, []

    def write() -> None:
        if full:
            raise ActiveDPOError("labels.jsonl cannot be written: no space left on device")
        written.append(1)

    writer = LabelsWriter(write)

    async def changes() -> None:
        nonlocal full
        for _ in range(3):
            await writer.changed()
        full = False
        await writer.changed()

    asyncio.run(changes())
    assert written == [1]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("labels file: labels.jsonl cannot be written: no space left on device")
