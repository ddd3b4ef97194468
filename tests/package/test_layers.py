"""A folder of the package imports only from itself and from the folders before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import activedpo_fast
import activedpo_fast.kernels

ROOT = Path(activedpo_fast.__file__).parent
KERNELS = Path(activedpo_fast.kernels.__file__).parent  # kernels/ of a checkout
# The path of the data, with the shared folders before it and the front doors after it. The kernels
# import the definitions in ops, which chooses among them.
ORDER = (
    "errors",
    "_printable",
    "_checks",
    "_limits",
    "_files",
    "_locks",
    "_modes",
    "_random",
    "progress",
    "kernels",
    "ops",
    "pool",
    "settings",
    "presets",
    "distributed",
    "models",
    "gradients",
    "store",
    "selection",
    "labels",
    "selector",
    "training",
    "report",
    "demo",
    "cli",
)


def _imports(path: Path) -> set[str]:
    """Parts of the package that a module imports, except those imported only for types."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        names = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if names == ["activedpo_fast"] and isinstance(node, ast.ImportFrom):
            names = [f"activedpo_fast.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("activedpo_fast.")}
    return found


@pytest.mark.parametrize("part", ORDER)
def test_imports_follow_the_path_of_the_data(part: str) -> None:
    own = KERNELS if part == "kernels" else ROOT / part
    files = sorted(own.rglob("*.py")) if own.is_dir() else [own.with_suffix(".py")]
    later = set(ORDER[ORDER.index(part) + 1 :]) - ({"ops"} if part == "kernels" else set())
    wrong = {(f"{part}/{path.name}", name) for path in files for name in _imports(path) & later}
    assert not wrong


def test_every_module_has_its_place() -> None:
    here = {
        path.stem
        for path in ROOT.iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    }
    assert (here | {"kernels"}) - {"__init__", "__main__"} == set(ORDER)
