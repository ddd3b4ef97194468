"""The progress bar that all stages use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(
    show: bool | None, iterable: Iterable[Any] | None = None, *, total: int, desc: str, unit: str
) -> tqdm[Any]:
    """Return a tqdm bar that stays on screen; `show`: True, False, or None for terminals only."""
    return tqdm(
        iterable, total=total, desc=desc, unit=unit, disable=None if show is None else not show
    )
