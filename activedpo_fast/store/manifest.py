"""A store's manifest: what its rows depend on, and the checksums of its other files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from activedpo_fast._files import read_checked_json, read_json, write_checked_json
from activedpo_fast.errors import ActiveDPOError

FORMAT = 5  # 1 had a different sjlt, 2 a different kronecker, 3 no token hashes, 4 no checksums
MANIFEST = "manifest.json"
_MOST_RESPONSES = 10**8  # what is missing is found in arrays of this length

# What its entries are. `tokens` and `filling` are there once rows are computed.
_TYPES: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "pool": (str,),
    "responses": (int,),
    "skipped": (list,),
    "settings": (dict,),
    "files": (dict,),
}
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "next_files": (dict,),  # checksums of files that are about to be replaced
    "tokens": (str,),
    "filling": (dict,),
}
_FILLING = {"rows_per_shard": int, "max_tokens_per_batch": int, "layout": str, "extractor": dict}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of the store in `folder`.

    Raises:
        ActiveDPOError: there is none, it is damaged, or another version of this library made it.
    """
    path = folder / MANIFEST
    if not path.exists():
        why = f"no {MANIFEST} in it" if folder.is_dir() else "there is no such folder"
        raise ActiveDPOError(
            f"{folder} is not a feature store ({why}): give the folder that `activedpo features` "
            "wrote, its --output"
        )
    found = read_json(path)
    version = found.get("format") if isinstance(found, dict) else None
    if type(version) is not int:
        raise ActiveDPOError(f"{folder} is a feature store of an unknown format")
    if version < FORMAT:
        raise ActiveDPOError(
            f"{folder} is a feature store that an older version made (format {version}, now "
            f"{FORMAT}), whose rows may be of other tokens: take them again into another folder"
        )
    if version > FORMAT:
        raise ActiveDPOError(
            f"{folder} is a feature store that a newer version made (format {version}, here "
            f"{FORMAT}): update activedpo-fast"
        )
    manifest = read_checked_json(path)
    _check_types(path, manifest, _TYPES, required=True)
    _check_types(path, manifest, _OPTIONAL, required=False)
    _check_types(path, manifest.get("filling", {}), _FILLING, required="filling" in manifest)
    _check_values(path, manifest)
    unknown = manifest.keys() - _TYPES.keys() - _OPTIONAL.keys()
    if unknown:
        raise ActiveDPOError(
            f"{path} has {sorted(unknown)[0]!r}, which this version does not know: update "
            "activedpo-fast"
        )
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_checked_json(folder / MANIFEST, manifest)


def key_of(manifest: Mapping[str, Any]) -> bytes:
    """Return the key of the checksums of a store's rows, 32 bytes: other rows have another."""
    names = ("format", "pool", "responses", "skipped", "settings", "tokens")
    own = json.dumps([manifest[name] for name in names], sort_keys=True)
    return hashlib.blake2b(own.encode(), digest_size=32).digest()


def _check_types(
    path: Path, found: Mapping[str, Any], types: Mapping[str, Any], *, required: bool
) -> None:
    for name, kinds in types.items():
        if name not in found and not required:
            continue
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if type(found.get(name)) not in kinds:
            raise ActiveDPOError(
                f"{path}: {name!r} is missing or not {kinds[0].__name__}: put the file back as it "
                "was, or take the rows again into another folder"
            )


def _check_values(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse values that no store has; another version, or an editor, may have written them."""
    filling = manifest.get("filling", {"rows_per_shard": 1, "max_tokens_per_batch": 1})
    sums = {**manifest["files"], **manifest.get("next_files", {})}
    wrong = {
        "responses": not 0 < manifest["responses"] <= _MOST_RESPONSES,
        "skipped": not all(type(row) is int for row in manifest["skipped"]),
        "store_dtype": not isinstance(manifest["settings"].get("store_dtype"), str),
        "files": not all(isinstance(checksum, str) for checksum in sums.values()),
        "rows_per_shard": filling["rows_per_shard"] < 1,
        "max_tokens_per_batch": filling["max_tokens_per_batch"] < 1,
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise ActiveDPOError(
            f"{path}: {name!r} has a value that no store has: put the file back as it was, or take "
            "the rows again into another folder"
        )
