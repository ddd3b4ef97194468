"""Whether a folder is the store that is wanted, and what differs if it is not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from activedpo_fast._locks import LOCK
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.template import own_template_kwargs
from activedpo_fast.store.folder import POOL, is_temporary_file
from activedpo_fast.store.manifest import MANIFEST


def check_store_folder(folder: Path, pool: PreferencePool) -> None:
    """Raise `ActiveDPOError` if a folder holds something else than a store, or one begun."""
    if not (folder / MANIFEST).exists() and not _is_unused(folder, pool.jsonl()):
        raise ActiveDPOError(f"{folder} exists and is not a feature store: choose another path")


def require_same_settings(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], how: str = "made"
) -> None:
    """Raise `ActiveDPOError` for the first setting that differs; see `first_difference`."""
    differs = first_difference(before, now)
    if differs is not None:
        raise ActiveDPOError(f"{folder} was {how} {differs}: choose another path")


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first setting that differs, as in "with beta = 0.2, not 0.1"; None if none does.

    The location of a model, adapter or tokenizer does not count if it has a fingerprint.
    """
    for name, old, new in _differences(before, now):
        if {f"{name}_fingerprint"} <= before.keys() & now.keys():
            continue
        what = name.removesuffix("_fingerprint")
        if what == name:
            return f"with {name} = {old!r}, not {new!r}"
        where = (
            f"{now[what]} has changed since"
            if before[what] == now[what]
            else f"{before[what]!r}, not {now[what]!r}"
        )
        return f"with another {what} ({where})"
    return None


def pool_difference(old: PreferencePool, new: PreferencePool) -> str:
    """Return how two pools differ, by their first differing item."""
    for n, (a, b) in enumerate(zip(old, new, strict=False), start=1):
        if a.id != b.id:
            return f"item {n} was {a.id!r}, now {b.id!r}"
        if (a.prompt, a.responses) != (b.prompt, b.responses):
            return f"the texts of item {a.id!r} have changed"
        if own_template_kwargs(a.extra) != own_template_kwargs(b.extra):
            return f"item {a.id!r} has another 'chat_template_kwargs' or other 'tools'"
    return f"of {len(old)} prompts, now {len(new)}"


def changed_columns(old: PreferencePool, new: PreferencePool) -> list[str]:
    """Return the columns in which two pools of the same items differ, by name."""
    changed: set[str] = set()
    for before, now in zip(old, new, strict=True):
        for name in {**now.extra, **before.extra}:
            # A table has null for a key that a JSON line omits.
            if _text(before.extra.get(name)) != _text(now.extra.get(name)):
                changed.add(name)
    return sorted(changed)


def _is_unused(folder: Path, pool: bytes) -> bool:
    """Return whether there is no folder, or only what a process left that began a store in it."""
    if not os.path.exists(folder):
        return True
    if not folder.is_dir():
        return False
    for path in folder.iterdir():
        if path.name == POOL and path.is_file() and path.read_bytes() == pool:
            continue
        if path.name != LOCK and not is_temporary_file(path.name):
            return False
    return True


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    # In the order of the settings: chosen settings come before those derived from them.
    for name in dict.fromkeys([*wanted, *found]):
        if found.get(name) != wanted.get(name):
            yield name, found.get(name), wanted.get(name)


def _text(value: Any) -> str:
    """Return a text that JSON values share only if they are equal; any text for non-JSON."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return repr(value)  # writing the pool refuses it, naming the column
