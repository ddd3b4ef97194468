"""The kernels as a Hub kernel: loaded from a folder, without the package that they come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest
import torch

from activedpo_fast.ops import reference
from tests.ops.test_ops import KEY, random

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "scripts" / "hub_kernels.py"
if not SCRIPT.is_file():
    pytest.skip("the package's sources are not here", allow_module_level=True)
# The variant of this machine; on a CPU Triton interprets the kernels.
BACKEND = "cuda" if torch.cuda.is_available() else "cpu"

spec = util.spec_from_file_location("hub_kernels", SCRIPT)
assert spec is not None and spec.loader is not None
hub_kernels = util.module_from_spec(spec)
spec.loader.exec_module(hub_kernels)

# How the package `kernels` loads a variant, for where it is not installed.
IMPORTED = """
import importlib.util, json
def load(folder):
    path = folder / "build" / f"torch-{BACKEND}"
    name = json.loads((path / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
RUN = """
import sys
from pathlib import Path
import torch
folder, files, BACKEND = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
{load}
kernel = load(folder)
left, right, segments, key = torch.load(files / "given.pt")
out = torch.zeros(3, 64, dtype=torch.float64, device=BACKEND)
given = [(left.to(BACKEND), right.to(BACKEND), key)]
kernel.lora_grad_sketches(out, given, segments, "sjlt", True)
logps, grad = kernel.response_logp_grad(left.to(BACKEND), torch.zeros(len(left), dtype=torch.int64,
    device=BACKEND), torch.ones(len(left), device=BACKEND))
torch.save((out.cpu(), logps.cpu(), grad.cpu()), files / "found.pt")
assert not any(name.startswith("activedpo") for name in sys.modules), "it needs the package"
"""


def has_kernels() -> bool:
    """Whether Hugging Face's package is installed; the folder kernels/ of a checkout is not it."""
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(IMPORTED, id="imported"),
        pytest.param(
            "from kernels import get_local_kernel as load",
            id="kernels",
            marks=pytest.mark.skipif(not has_kernels(), reason="pip install activedpo-fast[hub]"),
        ),
    ],
)
def test_a_kernel_of_a_local_folder_equals_the_definition(load: str, tmp_path: Path) -> None:
    hub_kernels.write_project(tmp_path / "project")
    hub_kernels.write_variant(tmp_path / "project", BACKEND)
    left, right = random(40, 5).float(), random(40, 30, seed=1).float()
    segments = torch.tensor([[0, 10, 2], [10, 40, 0], [3, 17, 2]])
    torch.save((left, right, segments, KEY), tmp_path / "given.pt")
    path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    others = [folder for folder in path if Path(folder).resolve() != SCRIPT.parents[1]]
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-c", RUN.format(load=load)),
            *(str(tmp_path / "project"), str(tmp_path), BACKEND),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(others)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    out, logps, grad = torch.load(tmp_path / "found.pt")
    expected = reference.outer_sketch(left.double(), right.double(), segments, KEY, 64, 3, "sjlt")
    assert bool(((out - expected).norm(dim=1) <= 1e-6 * expected.norm(dim=1)).all())
    targets, weights = torch.zeros(40, dtype=torch.int64), torch.ones(40, dtype=torch.float64)
    expected_logps, expected_grad = reference.response_logp_grad(left.double(), targets, weights)
    torch.testing.assert_close(logps.double(), expected_logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-6)


def test_the_project_says_what_the_variant_does(tmp_path: Path) -> None:
    hub_kernels.write_project(tmp_path)
    hub_kernels.write_variant(tmp_path, "cuda")
    said = tomllib.loads((tmp_path / "build.toml").read_text())
    variant = tmp_path / "build" / "torch-cuda"
    found = json.loads((variant / "metadata.json").read_text())
    assert "torch-noarch" in said and said["general"]["backends"] == [found["backend"]["type"]]
    assert all(said["general"][name] == found[name] for name in ("name", "version", "license"))
    sources = {path.name: path.read_text() for path in variant.glob("*.py")}
    package = tmp_path / "torch-ext" / said["general"]["name"].replace("-", "_")
    assert sources == {path.name: path.read_text() for path in package.iterdir()}
    assert not any(
        "import activedpo" in text or "from activedpo" in text for text in sources.values()
    )
    assert not any("torch.library" in text for text in sources.values())
