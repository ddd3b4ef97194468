"""Every GPU kernel compiles for every target without a GPU, and only these kernels are launched.

Kernels are compiled in separate processes, in which Triton does not interpret them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.gpu.kernel_resources import ARCHS, LIMITS, Resources, main

triton = pytest.importorskip("triton")

# Bytes of stack per thread. Block shapes were chosen with the compilers named here; other compilers
# are allowed to spill more.
MORE = 0 if triton.__version__.startswith(("3.6.", "3.7.", "3.9.")) else 64
ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Any]]


def compiling(cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run python -m COMMAND in a process that compiles, with Triton's cache in this folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1200,
    )


# All kernels take minutes for each architecture. Every run of the suite compiles a part of them for
# one architecture, in which each kernel still has every word that distinguishes its variants.
# Left out: only another type than bf16; tiles of middle size; the largest.
OTHERS = ("fp16", "32x64", "64x32", "128x64", "128x128", "128")
PART = (
    *OTHERS,
    # Each tile has one method, type and mode.
    *("16x128 sjlt", "16x128 kronecker fp32", "16x128 kronecker fast"),
    *("128x16 kronecker", "128x16 sjlt bf16", "128x16 sjlt deterministic"),
    *("form fp32 128x16", "form bf16 16x128", "form fp32 64x64"),
    *("32 rows 3 pieces", "64 rows 2 pieces"),
    *("fp32 no", "fp32 anywhere", "bf16 any", "bf16 anywhere no"),
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((90, PART), id="sm_90 in part"),
        *(pytest.param((arch, ()), id=f"sm_{arch}", marks=pytest.mark.slow) for arch in ARCHS),
    ],
)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The resources that the binaries of one architecture need.

    Triton's cache, which knows binaries by the kernels' code, the options and the compiler, is that
    of pytest: kernels that are the same as in an earlier run are not compiled again.
    """
    folder = tmp_path_factory.mktemp("compiled")
    kept = getattr(request.config, "cache", None)  # not with -p no:cacheprovider
    arch, skipped = request.param
    ran = compiling(
        folder / "cache" if kept is None else kept.mkdir("triton"),
        "benchmarks.gpu.kernel_resources",
        *(f"--arch={arch}", f"--json={folder / 'found.json'}"),
        *(f"--skip={word}" for word in skipped),
    )
    assert ran.returncode in (0, 1), ran.stdout
    return json.loads((folder / "found.json").read_text())["kernels"]


def test_every_variant_compiles(rows: Rows) -> None:
    assert {row["name"]: row["error"] for row in rows if row["error"]} == {}
    kernels = {row["name"].split()[0] for row in rows}
    assert {"lora_grad_sketch", "lora_grad_rademacher", "response_logp_grad"} <= kernels


def test_no_register_is_spilled(rows: Rows) -> None:
    assert {
        row["name"]: row["stack"]
        for row in rows
        if row["stack"] > LIMITS[row["arch"]].spilled + MORE
    } == {}


def test_a_block_fits(rows: Rows) -> None:
    for row in (row for row in rows if not row["error"]):
        assert 0 < row["registers"] <= 255, row
        assert row["shared"] <= LIMITS[row["arch"]].shared * 1024, row
        assert row["resident_warps"] >= row["warps"], row


def test_products_use_tensor_cores(rows: Rows) -> None:
    halves = [row for row in rows if {"bf16", "f16"} & set(row["dots"])]
    assert halves
    assert [row["name"] for row in halves if not row["tensor_instructions"]] == []


def test_there_are_no_other_problems(rows: Rows) -> None:
    others = {
        row["name"]: [problem for problem in row["problems"] if "spills" not in problem]
        for row in rows
    }
    assert {name: problems for name, problems in others.items() if problems} == {}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests.support.launches finds."""
    folder = tmp_path_factory.mktemp("launches")
    ran = compiling(folder / "cache", "tests.support.launches", str(folder / "found.json"))
    assert ran.returncode == 0, ran.stdout
    return json.loads((folder / "found.json").read_text())


def test_every_launch_is_a_compiled_variant(launches: dict[str, Any]) -> None:
    """For every shape, the types, constants, alignments, warps and stages are those of a
    variant."""
    assert launches["launches"] > 1000
    assert launches["wrong"] == []
    assert launches["unknown"] == []
    assert launches["idle"] == []


def test_what_every_run_compiles(launches: dict[str, Any]) -> None:
    every = [name.split() for name in launches["variants"]]
    part = [words for words in every if not any({*skip.split()} <= {*words} for skip in PART)]
    assert len(part) < len(every) / 3

    def distinguished(variants: list[list[str]]) -> set[tuple[str, str]]:
        return {(words[0], word) for words in variants for word in words}

    wanted = distinguished([words for words in every if {*words}.isdisjoint(OTHERS)])
    assert wanted == distinguished(part)


def test_faults_are_found(tmp_path: Path) -> None:
    ran = compiling(
        tmp_path,
        "benchmarks.gpu.kernel_resources",
        "--module",
        "tests.support.bad_kernels",
        "--arch",
        "80",
        "--json",
        str(tmp_path / "found.json"),
    )
    assert ran.returncode == 1, ran.stdout
    assert "6 binaries, 4 with problems" in ran.stdout
    rows = json.loads((tmp_path / "found.json").read_text())["kernels"]
    assert [row["name"] for row in rows] == [
        "right",
        "spills",
        "large",
        "refused",
        "fatal",
        "after it",
    ]
    right, spills, large, refused, fatal, after = rows
    assert right["problems"] == after["problems"] == []
    assert right["dots"] == ["bf16"] and 0 < right["tensor_instructions"] < right["instructions"]
    assert 0 < right["registers"] and right["resident_warps"] % right["warps"] == 0
    assert spills["stack"] > 0 and "spills registers" in spills["problems"][0]
    assert large["shared"] == 288 * 1024 and "over the 163 KiB" in large["problems"][0]
    assert "power of 2" in refused["problems"][0]
    assert "process died" in fatal["problems"][0]


def test_idle_tensor_cores_and_too_many_registers_are_faults() -> None:
    found = Resources("", 80, warps=16, registers=168, dots=["bf16"]).problems()
    assert len(found) == 2
    assert "does not fit into a multiprocessor" in found[0] and "without tensor cores" in found[1]
    assert Resources("", 80, warps=16, registers=128, dots=["f32"]).problems() == []


@pytest.mark.parametrize(
    ("registers", "shared", "warps"),
    [
        (32, 0, 64),
        (128, 0, 16),
        (168, 0, 12),
        (176, 0, 8),
        (255, 0, 8),
        (32, 40 * 1024, 16),
        (32, 163 * 1024, 4),
    ],
)
def test_resident_warps(registers: int, shared: int, warps: int) -> None:
    """The numbers of NVIDIA's occupancy calculator, for blocks of 4 warps on sm_80."""
    found = Resources("", 80, warps=4, registers=registers, shared=shared)
    assert found.resident_warps == warps


def test_an_unknown_architecture_is_a_one_line_error() -> None:
    app = typer.Typer()
    app.command()(main)
    ran = CliRunner().invoke(app, ["--arch", "75"])
    assert ran.exit_code == 2
    assert ran.output.startswith("error: no limits are known of sm_75")
    assert ran.output.count("\n") == 1
