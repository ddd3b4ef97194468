"""Packages for a machine without a network, from a folder of wheels."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from zipfile import ZipFile


def unpack(wheels: Path, target: Path) -> list[str]:
    """Unpack the wheels of packages that are not installed into `target`; return their names.

    Nothing is run and no dependencies are resolved: the folder must have them, too.
    """
    unpacked = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if not _installed(name):
            with ZipFile(wheel) as archive:
                archive.extractall(target)
            unpacked.append(f"{name} {version}")
    return unpacked


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
