"""The stubs of the extension modules, _csrc.pyi and the others, against the modules themselves."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import activedpo_fast
from activedpo_fast.ops import backends
from tests.support.native import module_for_tests

MODULES = {
    "_csrc": lambda: backends._csrc or pytest.skip(backends._WHY_NO_CPP),
    "_cuda": lambda: backends._cuda or pytest.skip(backends._WHY_NO_CUDA),
    "_testing": module_for_tests,
}
# By position, by name only, and what is returned, without what is inside its brackets.
Signature = tuple[list[str], list[str], str]


def signature(function: ast.FunctionDef) -> Signature:
    arguments = function.args
    returned = "None" if function.returns is None else ast.unparse(function.returns)
    return (
        [argument.arg for argument in arguments.args if argument.arg != "self"],
        [argument.arg for argument in arguments.kwonlyargs],
        returned.split("[")[0],
    )


def in_stub(path: Path) -> dict[str, Signature | None]:
    """The signatures of a stub's functions and constructors; None for what is not called."""
    found: dict[str, Signature | None] = {}
    kinds: dict[str, Signature] = {}  # of functions that differ in their dtype alone
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = signature(node)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    assert member.name in ("__init__", "__call__")
                    table = kinds if member.name == "__call__" else found
                    table[node.name] = signature(member)
                elif isinstance(member, ast.AnnAssign):
                    found[f"{node.name}.{ast.unparse(member.target)}"] = None
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = kinds.get(ast.unparse(node.annotation))
    return found


def in_module(module: Any) -> dict[str, Signature | None]:
    """The same of a module, from the first lines of its docstrings, which pybind11 writes."""
    found: dict[str, Signature | None] = {}

    def written(documented: Any) -> Signature:
        (function,) = ast.parse(f"def {documented.__doc__.splitlines()[0]}: ...").body
        assert isinstance(function, ast.FunctionDef)
        return signature(function)

    for name, value in vars(module).items():
        if name.startswith("__"):
            continue
        if isinstance(value, type):
            found[name] = written(value.__init__)
            found |= {
                f"{name}.{member}": None
                for member, what in vars(value).items()
                if isinstance(what, property)
            }
        else:
            found[name] = written(value) if callable(value) else None
    return found


@pytest.mark.parametrize("name", MODULES)
def test_a_stub_has_the_functions_of_its_module_and_their_arguments(name):
    stub = Path(activedpo_fast.__file__).parent / f"{name}.pyi"
    assert in_stub(stub) == in_module(MODULES[name]())


def test_a_stub_is_read_to_its_argument_names(tmp_path):
    stub = tmp_path / "x.pyi"
    stub.write_text(
        "class _Kind(Protocol):\n"
        "    def __call__(self, a: int, *, b: int) -> tuple[int, int]: ...\n"
        "class Taken:\n"
        "    count: int\n"
        "    def __init__(self, *, c: int) -> None: ...\n"
        "one_float32: _Kind\n"
        "version: str\n"
        "def two(d: int) -> bool: ...\n"
    )
    assert in_stub(stub) == {
        "Taken.count": None,
        "Taken": ([], ["c"], "None"),
        "one_float32": (["a"], ["b"], "tuple"),
        "version": None,
        "two": (["d"], [], "bool"),
    }
