"""The runs of a task on disk: each is made once, and again where its definition has changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from activedpo_fast._files import read_json, write_atomic

Run = dict[str, Any]
_DIGITS = 3  # of rewards, which are shares; widths and errors are of the same size


class Results:
    """Runs in one JSON file, by a text that says all that they depend on, and by seed.

    Args:
        version: of the task; runs of another one are forgotten.
    """

    def __init__(self, path: Path, version: int) -> None:
        self._path = path
        self._version = version
        content: dict[str, Any] = read_json(path) if path.exists() else {}
        found = content if content.get("version") == version else {}
        self.environment: dict[str, Any] = found.get("environment", {})
        self._runs: dict[str, dict[int, Run]] = {
            key: {int(seed): run for seed, run in runs.items()}
            for key, runs in found.get("runs", {}).items()
        }

    def runs(self, key: str) -> dict[int, Run]:
        """The runs of a key, by seed."""
        return self._runs.get(key, {})

    def add(self, key: str, seed: int, run: Run) -> None:
        """Add a run; `save` writes it."""
        self._runs.setdefault(key, {})[seed] = _rounded(run)

    def save(self, environment: dict[str, Any]) -> None:
        """Write everything, one line per run, so that a change is a line of a diff."""
        self.environment = environment
        write_atomic(self._path, "".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        yield (
            f'{{\n"version": {self._version},\n"environment": {json.dumps(self.environment)},\n'
            '"runs": {\n'
        )
        for n, (key, runs) in enumerate(sorted(self._runs.items())):
            yield ("" if n == 0 else ",\n") + f"{json.dumps(key)}: {{\n"
            yield ",\n".join(f'"{seed}": {json.dumps(run)}' for seed, run in sorted(runs.items()))
            yield "\n}"
        yield "\n}\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return value
