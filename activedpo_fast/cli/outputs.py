"""Which files a command may write: none that it reads, and none of a store or a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from activedpo_fast._files import FilePath, check_file_target, read_json, regular_target
from activedpo_fast.errors import ActiveDPOError


def check_output(option: str, path: FilePath | None, inputs: Mapping[str, FilePath | None]) -> None:
    """Raise `ActiveDPOError` if a command may not write to `path`; None (not wanted) passes.

    Args:
        option: the option that names it, such as "--output".
        inputs: what the command reads, or writes otherwise: options, and their files or folders.
    """
    if path is None:
        return
    check_file_target(path)
    target = regular_target(path)
    for name, other in inputs.items():
        if other is None or not os.path.exists(other):
            continue
        same = target.exists() and os.path.samefile(target, other)  # also by a hard link
        if same or (Path(other).is_dir() and _inside(target, Path(other))):
            where = "is" if same else "is inside"
            raise ActiveDPOError(f"{path} {where} what {name} names: choose another {option}")
    for folder in target.resolve().parents:
        what = _ours(folder)
        if what is not None:
            raise ActiveDPOError(f"{path} is inside {what}, {folder}: choose another {option}")


def _inside(target: Path, folder: Path) -> bool:
    return target.resolve().is_relative_to(folder.resolve())


def _ours(folder: Path) -> str | None:
    """Return what a folder is: a store, a run, or None for any other."""
    for name, keys, what in (
        ("manifest.json", {"format", "pool", "responses"}, "a feature store"),
        ("config.json", {"format", "settings", "versions"}, "the folder of a run"),
    ):
        if (folder / name).is_file():
            try:
                found = read_json(folder / name)
            except ActiveDPOError:
                continue
            if isinstance(found, dict) and keys <= found.keys():
                return what
    return None
