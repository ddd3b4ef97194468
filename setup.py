"""The C++ extension and the folder mapping; everything else is in pyproject.toml."""

from __future__ import annotations

import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

OPENMP = {"linux": ["-fopenmp"], "win32": ["/openmp"]}.get(sys.platform, [])
OPTIMISE = ["/O2"] if sys.platform == "win32" else ["-O3"]

extension = Pybind11Extension(
    "activedpo_fast._csrc",
    sources=sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    cxx_std=17,
    extra_compile_args=[*OPTIMISE, *OPENMP],
    extra_link_args=[] if sys.platform == "win32" else OPENMP,
    # Without a compiler the package still installs; activedpo_fast.ops says what is missing.
    optional=True,
)


class BuildExtension(build_ext):
    """Builds what it can, and says plainly what a failure means."""

    def build_extension(self, ext) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.warn(
                f"{ext.name} was not built ({error}). activedpo_fast works without it, on the "
                "slower PyTorch reference; for the C++ kernels install a C++17 compiler with "
                "OpenMP (for instance g++) and install again."
            )
            raise


setup(
    packages=[*find_packages(include=["activedpo_fast", "activedpo_fast.*"]),
              "activedpo_fast.kernels"],
    package_dir={"activedpo_fast.kernels": "kernels"},
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
)
