"""A project for Hugging Face's kernel-builder, made of the Triton kernels in kernels/.

    python scripts/hub_kernels.py FOLDER

FOLDER gets build.toml, the sources as the package torch-ext/activedpo_kernels, and what
kernel-builder makes of a package without compiled code, build/torch-cuda, which
`kernels.get_local_kernel` loads. There is no second copy of the sources: they are read from the
checkout, and their imports become relative, as a Hub kernel has another name in every version.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME, VERSION = "activedpo-kernels", 1
PACKAGE = NAME.replace("-", "_")
# Parts of the package that kernels/ imports; they import nothing of it.
DEFINITIONS = {
    name: ROOT / "activedpo_fast" / "ops" / f"{name}.py" for name in ("layout", "reference")
}
# The functions that launch kernels. None is registered with PyTorch, so that there is no namespace
# of operations for two versions to collide in.
PUBLIC = {
    "lora_grad_sketch": "lora_grad_sketches",
    "lora_grad_rademacher": "lora_grad_rademacher, rademacher_rows",
    "sjlt_rows": "sjlt_rows",
    "response_logp_grad": "response_logp_grad",
}
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 6
license = "Apache-2.0"
backends = ["cuda"]

[torch-noarch]
"""


def sources() -> dict[str, str]:
    """Return the files of the package by name, with relative imports."""
    files = {path.name: path for path in sorted((ROOT / "kernels").glob("*.py"))}
    files |= {f"{name}.py": path for name, path in DEFINITIONS.items()}
    found = {name: _relative(path.read_text()) for name, path in files.items()}
    exports = "".join(f"from .{module} import {names}\n" for module, names in PUBLIC.items())
    # Last: the modules import functions of the package itself.
    found["__init__.py"] += f"\n\n# ruff: noqa: E402, F401\n{exports}"
    return found


def _relative(source: str) -> str:
    source = re.sub(r"\bactivedpo_fast\.(?:kernels|ops)(?=\.\w+ import)", "", source)
    source = re.sub(r"\bactivedpo_fast\.(?:kernels|ops)(?= import)", ".", source)
    if left := re.search(r"^.*(?:from|import) activedpo_fast.*$", source, re.MULTILINE):
        raise SystemExit(f"an import of kernels/ does not work outside of the package: {left[0]}")
    return source


def write_project(folder: Path) -> None:
    """Write build.toml and torch-ext/, what kernel-builder reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.toml").write_text(BUILD)
    _write_package(folder / "torch-ext" / PACKAGE)


def write_variant(folder: Path, backend: str) -> None:
    """Write build/torch-<backend>, the noarch variant that the package `kernels` loads."""
    target = folder / "build" / f"torch-{backend}"
    _write_package(target)
    content = "".join(f"{name}\0{text}\0" for name, text in sorted(sources().items()))
    digest = hashlib.sha256(content.encode()).hexdigest()[:7]
    metadata = {
        "id": f"_{PACKAGE}_{backend}_{digest}",
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _write_package(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name, text in sources().items():
        (target / name).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_project(Path(sys.argv[1]))
    write_variant(Path(sys.argv[1]), "cuda")
