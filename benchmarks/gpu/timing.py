"""Times on a GPU by events, or on the CPU by the clock in a dry run without a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.cases import Record, Settings

REPEATS, WARM_UP = 21, 3
_BEYOND_CACHE = 3  # the rotated inputs together are this many times the L2 cache
_MOST_SETS = 64
_HOLD = 0.25  # the longest time for which the GPU is kept from starting, in seconds


class Timer:
    """Medians of repeated calls.

    On a GPU, the calls are queued while the stream is kept busy, and timed by events between them:
    the GPU's time for each, without gaps from launching. `host` is the CPU's time to launch one.
    """

    def __init__(self, settings: Settings) -> None:
        self.device = settings.device
        self.repeats = 1 if settings.tiny else REPEATS
        self.warm_up = 1 if settings.tiny else WARM_UP

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> Record:
        """Seconds of one call; the calls, one per input, take turns."""
        turns = [calls[i % len(calls)] for i in range(max(self.repeats, len(calls)))]
        for call in turns[: self.warm_up]:
            call()
        self._wait()
        host = self._launched(turns[: self.warm_up])
        times = self._events(turns, host) if self.device == "cuda" else [_clock(c) for c in turns]
        return {
            "seconds": statistics.median(times),
            "least": min(times),
            "most": max(times),
            "host_seconds": host,
            "repeats": len(times),
            "inputs": len(calls),
        }

    def _events(self, turns: Sequence[Callable[[], Any]], host: float) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(turns) + 1)]
        hold = min(_HOLD, 1.5 * host * len(turns))
        torch.cuda._sleep(int(hold * clock_rate()))
        events[0].record()
        for event, call in zip(events[1:], turns, strict=True):
            call()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]

    def _launched(self, turns: Sequence[Callable[[], Any]]) -> float:
        """Seconds until one call returns, the GPU idle before it."""
        found = []
        for call in turns:
            found.append(_clock(call))
            self._wait()
        return statistics.median(found)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def wall_seconds(function: Callable[[], Any], device: str) -> float:
    """Seconds by the clock until everything that `function` started has ended."""
    if device == "cuda":
        torch.cuda.synchronize()

    def whole() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return _clock(whole)


def input_sets(bytes_of_one: int, settings: Settings) -> int:
    """The number of inputs to rotate so that none is still in the cache when its turn comes."""
    if settings.device != "cuda":
        return 2
    wanted = -(-_BEYOND_CACHE * cache_bytes() // bytes_of_one)
    return max(2, min(_MOST_SETS, wanted))


def cache_bytes() -> int:
    """The GPU's L2 cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def clock_rate() -> float:
    """The GPU's cycles per second, approximately."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return 1e3 * getattr(properties, "clock_rate", 1.8e6)


def copy_bandwidth(settings: Settings, timer: Timer) -> Record:
    """Bytes per second of a copy on the device, counting both reads and writes."""
    count = 1 << (12 if settings.tiny else 28)
    source = torch.randint(1 << 30, (count,), dtype=torch.int32, device=settings.device)
    target = torch.empty_like(source)
    times = timer([lambda: target.copy_(source)])
    return {**times, "bytes_a_second": 2 * source.nbytes / times["seconds"]}


def matrix_rate(settings: Settings, timer: Timer) -> Record:
    """Operations per second of a bfloat16 matrix product, on random numbers."""
    size = 64 if settings.tiny else 8192
    a, b = (torch.randn(size, size, device=settings.device).bfloat16() for _ in range(2))
    times = timer([lambda: a @ b])
    return {**times, "size": size, "flops_a_second": 2 * size**3 / times["seconds"]}


def _clock(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
