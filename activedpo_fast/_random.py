"""The global random generators, seeded for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the random generators with `seed` inside; restore the global ones afterward."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    else:
        # A model split across devices samples on the last one: fork them all.
        count = torch.get_device_module(device.type).device_count()
        with torch.random.fork_rng(devices=range(count), device_type=device.type):
            torch.manual_seed(seed)
            yield
