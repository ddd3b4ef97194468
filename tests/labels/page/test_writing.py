"""The labels file is written after every answer, except where that would take all the time."""

from __future__ import annotations

import asyncio

import pytest

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.page.writing import LabelsWriter


def test_a_quick_write_follows_every_change() -> None:
    written: list[int] = []
    writer = LabelsWriter(lambda: written.append(1), clock=lambda: 7.0)

    async def changes() -> None:
        for n in range(5):
            await writer.changed()
            assert len(written) == n + 1

    asyncio.run(changes())


def test_a_slow_write_comes_later_and_once_for_many_changes() -> None:
    state, seconds, written = 0, 7.0, []

    def write() -> None:
        nonlocal seconds
        seconds += 0.06
        written.append(state)

    writer = LabelsWriter(write, clock=lambda: seconds)

    async def changes() -> None:
        nonlocal state
        for _ in range(50):
            state += 1
            await writer.changed()
        assert written == [1]
        while len(written) < 2:
            await asyncio.sleep(0.05)
        assert written == [1, 50]  # the last change is not forgotten

    asyncio.run(changes())


def test_a_write_that_fails_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
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
