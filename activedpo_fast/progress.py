"""The one progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(
    show: bool | None, iterable: Iterable[Any] | None = None, *, total: int, desc: str, unit: str
) -> tqdm[Any]:
    """A tqdm bar; `show` is True, False, or None for terminals only. It leaves what it shows."""
    return tqdm(iterable, total=total, desc=desc, unit=unit,
                disable=None if show is None else not show)
