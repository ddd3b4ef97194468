"""Build the C++ and CUDA extensions; set the folder mapping. The rest is in pyproject.toml.

activedpo_fast._csrc is for the CPU, _cuda for NVIDIA GPUs. _testing is made in a checkout (editable
installs, `build_ext --inplace`), not for wheels: only tests call it.

ACTIVEDPO_CUDA        "1": failing to build activedpo_fast._cuda is an error; "0": skip it;
                      unset: build it if there is nvcc, otherwise install the rest without it.
ACTIVEDPO_CUDA_ARCHS  GPU architectures, default "80;86;89;90a;100;120"; architectures of the
                      default that nvcc does not know are skipped. PTX of the highest is added,
                      for later GPUs.
ACTIVEDPO_PYBIND11_INCLUDE
                      folder with pybind11's headers, if the package is not installed.
CUDACXX, CUDA_HOME    location of nvcc; otherwise it is searched on PATH, in NVIDIA's packages
                      (`pip install "cuda-toolkit[nvcc,cudart]"`) of the Python that builds, and
                      where the toolkit usually is, /usr/local/cuda.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
except ImportError:  # its headers are enough, and torch ships them
    if not os.environ.get("ACTIVEDPO_PYBIND11_INCLUDE"):
        sys.exit(
            "setup.py needs the package pybind11 (pip install pybind11), or its headers in the "
            "folder that ACTIVEDPO_PYBIND11_INCLUDE names"
        )

    class Pybind11Extension(Extension):  # type: ignore[no-redef]
        """The parts of pybind11's class that are needed here."""

        def __init__(self, *args: Any, cxx_std: int, **options: Any) -> None:
            super().__init__(*args, language="c++", **options)
            self.include_dirs.append(os.environ["ACTIVEDPO_PYBIND11_INCLUDE"])
            self.extra_compile_args += [f"-std=c++{cxx_std}", "-fvisibility=hidden"]
else:
    # The .cpp files of an extension side by side: setuptools compiles one after another.
    ParallelCompile(default=os.cpu_count() or 1).install()

OPENMP = {"linux": ["-fopenmp"], "win32": ["/openmp"]}.get(sys.platform, [])
OPTIMIZE = ["/O2"] if sys.platform == "win32" else ["-O3"]

ARCHS = "80;86;89;90a;100;120"
USUAL_CUDA = "/usr/local/cuda"  # where NVIDIA's installers put the toolkit
OBJECTS = Path("build/cuda")  # compiled .cu files, kept from build to build

HEADERS = sorted(glob("csrc/*/*.h"))


def sources(*folders: str) -> list[str]:
    """Return the .cpp files of folders of csrc/."""
    return [path for folder in folders for path in sorted(glob(f"csrc/{folder}/*.cpp"))]


def cpu_extension(name: str, folders: tuple[str, ...]) -> Pybind11Extension:
    """Return an extension for the CPU. Without a compiler the package installs without it."""
    return Pybind11Extension(
        f"activedpo_fast.{name}",
        sources=sources(*folders),
        depends=HEADERS,
        include_dirs=["csrc"],
        cxx_std=17,
        extra_compile_args=[*OPTIMIZE, *OPENMP],
        extra_link_args=[] if sys.platform == "win32" else OPENMP,
        optional=True,
    )


cpu = cpu_extension("_csrc", ("bindings", "scores", "sketch"))
# Called by tests alone; see BuildExtension.finalize_options.
testing = cpu_extension("_testing", ("testing",))

# Its .cu files are compiled by nvcc (BuildExtension) and linked as objects. The CUDA runtime is
# linked in (libcudart_static.a) and looks for the driver on the first call, not at import.
cuda = Pybind11Extension(
    "activedpo_fast._cuda",
    sources=sources("cuda"),
    depends=[*HEADERS, *sorted(glob("csrc/cuda/*.cu"))],
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=OPTIMIZE,
    libraries=["cudart_static", "dl", "pthread", "rt"],
    extra_link_args=["-Wl,--exclude-libs,ALL"],
    optional=os.environ.get("ACTIVEDPO_CUDA") != "1",
)


class Nvcc:
    """NVIDIA's compiler and its toolkit.

    Attributes:
        includes, libraries: the toolkit's folders.
        archs: the architectures to compile for, such as "80" or "90a", in ascending order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # so that ./nvcc stays a path
        self._version = self.run("--version")
        self.includes, self.libraries = self._folders()
        self._require("header", "cuda_runtime.h", self.includes)
        self._require("library", "libcudart_static.a", self.libraries)
        self.archs = self._archs()

    @classmethod
    def find(cls) -> Nvcc | None:
        """Return the compiler of the environment; None if there is none."""
        for variable, below in (("CUDACXX", ""), ("CUDA_HOME", "/bin/nvcc")):
            if named := os.environ.get(variable):
                path = shutil.which(named + below)
                if path is None:
                    raise CompileError(f"{variable}={named} has no nvcc")
                return cls(Path(path))
        packages = [
            path
            for folder in sys.path
            for path in sorted(glob(f"{folder}/nvidia/*/bin/nvcc"), reverse=True)
        ]
        for place in ("nvcc", *packages, f"{USUAL_CUDA}/bin/nvcc"):
            if path := shutil.which(place):
                return cls(Path(path))
        return None

    def run(self, *arguments: str) -> str:
        """Run nvcc and return its output. Raises CompileError with the output if it fails."""
        command = [str(self.path), *arguments]
        try:
            done = subprocess.run(
                command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise CompileError(f"{self.path} cannot be run: {error}") from None
        if done.returncode:
            raise CompileError(f"{shlex.join(command)}\n{done.stdout}")
        return done.stdout

    def compile(self, source: Path, threads: int, host: str) -> tuple[Path, bool]:
        """Return the object of a .cu file, and whether it was compiled: it may already exist."""
        target = OBJECTS / f"{source.stem}.o"
        needs, says = target.with_suffix(".d"), target.with_suffix(".txt")
        options = [
            "-c",
            "-std=c++17",
            "-O3",
            "-Icsrc",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            f"-ccbin={host}",
            *self._code(),
            str(source),
        ]
        command = f"{shlex.join([str(self.path), *options])}\n{self._version}"
        if says.is_file() and says.read_text() == command and not _outdated(target, needs):
            return target, False
        says.unlink(missing_ok=True)  # so that an interrupted compilation is started again
        self.run(*options, f"--threads={threads}", "-MMD", f"-MF={needs}", f"-o={target}")
        says.write_text(command)
        return target, True

    def _code(self) -> list[str]:
        ptx = self.archs[-1].rstrip("af")  # PTX of 90a would not run on later GPUs
        return [
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs),
            f"-gencode=arch=compute_{ptx},code=compute_{ptx}",
        ]

    def _folders(self) -> tuple[list[str], list[str]]:
        # Ask nvcc, because the one on PATH may be a script that calls another one.
        said = self.run("--dryrun", "-c", "-x", "cu", os.devnull)
        lines = dict(re.findall(r"^#\$ (INCLUDES|LIBRARIES|TOP)= *(.*?) *$", said, re.MULTILINE))
        if not {"INCLUDES", "LIBRARIES", "TOP"} <= lines.keys():
            raise CompileError(f"{self.path} does not say where its toolkit is:\n{said}")
        top = Path(lines["TOP"]).resolve()
        flags = shlex.split(lines["INCLUDES"]) + shlex.split(lines["LIBRARIES"])
        return (
            [flag[2:] for flag in flags if flag.startswith("-I")],
            # pip's packages have lib/ but nvcc reports lib64/.
            [flag[2:] for flag in flags if flag.startswith("-L")] + [str(top / "lib")],
        )

    def _require(self, kind: str, name: str, folders: list[str]) -> None:
        if not any(Path(folder, name).is_file() for folder in folders):
            raise CompileError(
                f"the toolkit of {self.path} has no {kind} {name} in {', '.join(folders)}: install "
                "the development files of the CUDA runtime, or "
                '`pip install "cuda-toolkit[nvcc,cudart]"`'
            )

    def _archs(self) -> list[str]:
        known = set(re.findall(r"sm_(\d+)", self.run("--list-gpu-code")))
        wanted = os.environ.get("ACTIVEDPO_CUDA_ARCHS") or ARCHS
        archs = [arch for arch in re.split("[;, ]+", wanted) if arch]
        for arch in archs:
            if not re.fullmatch(r"\d+[af]?", arch):
                raise CompileError(f"ACTIVEDPO_CUDA_ARCHS has {arch!r}; it is a list like {ARCHS}")
        unknown = [arch for arch in archs if arch.rstrip("af") not in known]
        if unknown:
            said = f"{self.path} does not know the GPU architectures {', '.join(unknown)}"
            if wanted != ARCHS or unknown == archs:
                raise CompileError(f"{said}; it knows {', '.join(sorted(known, key=int))}")
            print(f"note: {said}: they are left out", file=sys.stderr)
        return sorted({*archs} - {*unknown}, key=lambda arch: (int(arch.rstrip("af")), arch))


class BuildExtension(build_ext):
    """Build what is possible, and explain failures."""

    extensions: list[Extension]
    force: bool

    def finalize_options(self) -> None:
        """Leave out the tests' extension unless the build is for this checkout: not in wheels."""
        super().finalize_options()
        if not (self.inplace or self.editable_mode):
            self.extensions = [ext for ext in self.extensions if ext is not testing]

    def build_extension(self, ext: Extension) -> None:
        try:
            _require_header("Python.h", sysconfig.get_path("include"), "Python's development files")
            if given := os.environ.get("ACTIVEDPO_PYBIND11_INCLUDE"):
                _require_header("pybind11/pybind11.h", given, "pybind11")
            if ext is cuda and not self._add_cuda_objects(ext):
                return
            super().build_extension(ext)
        except Exception as error:
            if ext is cuda:
                hint = (
                    "activedpo_fast works on GPUs without it, with fewer custom kernels; "
                    "ACTIVEDPO_CUDA=0 skips building it."
                )
            elif ext is testing:
                hint = "The tests that need it are skipped."
            else:
                hint = (
                    "activedpo_fast works without it, on the slower PyTorch reference; for "
                    "the C++ kernels install a C++17 compiler with OpenMP (for instance g++) "
                    "and install again."
                )
            self.warn(f"{ext.name} was not built ({error}). {hint}")
            raise

    def _add_cuda_objects(self, ext: Extension) -> bool:
        """Compile the .cu files; return False, and print why, if they are not to be compiled."""
        wanted = os.environ.get("ACTIVEDPO_CUDA") or "auto"
        if wanted not in ("auto", "0", "1"):
            raise CompileError(f"ACTIVEDPO_CUDA is {wanted!r}; it can be 0, 1 or not set")
        nvcc = None if wanted == "0" or sys.platform != "linux" else Nvcc.find()
        if nvcc is None:
            why = (
                "ACTIVEDPO_CUDA=0"
                if wanted == "0"
                else "it is for Linux"
                if sys.platform != "linux"
                else "there is no nvcc: CUDACXX and CUDA_HOME are not set, and it is not on PATH, "
                f"in the package nvidia-cuda-nvcc or in {USUAL_CUDA}"
            )
            if wanted == "1":
                raise CompileError(why)
            self._forget(ext)
            print(
                f"note: {ext.name} is not built ({why}); the CUDA C++ kernels will be missing",
                file=sys.stderr,
            )
            return False
        files = [Path(path) for path in sorted(glob("csrc/cuda/*.cu"))]
        cores = len(os.sched_getaffinity(0))
        OBJECTS.mkdir(parents=True, exist_ok=True)
        print(f"{ext.name}: {len(files)} CUDA files for {' '.join(nvcc.archs)} by {nvcc.path}")
        host = self.compiler.compiler_cxx[0]
        # Parallel over files and, within a file, over architectures: compile times differ.
        with ThreadPoolExecutor(cores) as pool:
            compiled = list(pool.map(lambda source: nvcc.compile(source, cores, host), files))
        ext.extra_objects = [str(target) for target, _ in compiled]
        ext.include_dirs += nvcc.includes
        ext.library_dirs += nvcc.libraries
        ext.define_macros += [("ACTIVEDPO_CUDA_ARCHS", f'"{";".join(nvcc.archs)}"')]
        self.force = self.force or any(new for _, new in compiled)
        return True

    def _forget(self, ext: Extension) -> None:
        """Remove the file of an earlier build: it would be installed as if this build made it."""
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)


def _require_header(name: str, folder: str, package: str) -> None:
    if not Path(folder, name).is_file():
        raise CompileError(f"{name} is not in {folder}: install {package}")


def _outdated(target: Path, needs: Path) -> bool:
    """Return whether an object is older than a file in its make-style dependency list."""
    if not (target.is_file() and needs.is_file()):
        return True
    named = needs.read_text().replace("\\\n", " ").partition(" : ")[2]
    sources = [
        Path(re.sub(r"\\(.)", r"\1", name))  # blanks in a name have a backslash
        for name in re.split(r"(?<!\\)\s+", named)
        if name
    ]
    made = target.stat().st_mtime_ns
    return not sources or any(
        not path.is_file() or path.stat().st_mtime_ns > made for path in sources
    )


setup(
    packages=[
        *find_packages(include=["activedpo_fast", "activedpo_fast.*"]),
        "activedpo_fast.kernels",
    ],
    package_dir={"activedpo_fast.kernels": "kernels"},
    ext_modules=[cpu, testing, cuda],
    cmdclass={"build_ext": BuildExtension},
)
