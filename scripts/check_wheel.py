"""Check what a wheel contains, and that it needs no other libraries. Part of `make wheel`.

Needs pyelftools, which comes with auditwheel, but not torch.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

# Libraries that every Linux system of the wheel's tag has, and libgomp, which torch ships.
ALLOWED = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux-.*)\.so.*"
    r"|libgomp\.so\.1"
)


def needed(data: bytes) -> list[str]:
    """Return the shared libraries that an ELF file needs."""
    section = ELFFile(io.BytesIO(data)).get_section_by_name(".dynamic")
    return [tag.needed for tag in section.iter_tags("DT_NEEDED")]


def problems(wheel: zipfile.ZipFile, tree: Path, cuda: bool) -> list[str]:
    """List what is wrong with a wheel that was built from a tree, with or without CUDA."""
    found = []
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    if {re.sub(r"-.*(?=\.dist-info)", "", top) for top in tops} != {
        "activedpo_fast",
        "activedpo_fast.dist-info",
    }:
        found.append(f"top-level names are {sorted(tops)}")
    wanted = {f"activedpo_fast/kernels/{path.name}" for path in tree.glob("kernels/*.py")} | {
        str(path.relative_to(tree)) for path in tree.glob("activedpo_fast/**/*.py")
    }
    wanted |= {f"activedpo_fast/{module}.pyi" for module in ("_csrc", "_cuda")}
    found += [f"{name} is missing" for name in sorted(wanted - {*names})]
    libraries = [name for name in names if ".so" in Path(name).suffixes]
    for module, expected in (("_csrc", True), ("_cuda", cuda)):
        if any(name.startswith(f"activedpo_fast/{module}.") for name in libraries) != expected:
            found.append(f"{module} is missing" if expected else f"{module} should not be there")
    found += [f"{name} is for tests" for name in names if "/_testing." in name]
    for name in libraries:
        needs = needed(wheel.read(name))
        print(f"  {name}: {wheel.getinfo(name).file_size / 1e6:.1f} MB, needs {' '.join(needs)}")
        found += [f"{name} needs {library}" for library in needs if not ALLOWED.fullmatch(library)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--tree", type=Path, required=True, help="the tree it was built from")
    parser.add_argument("--cuda", choices="01", default="1", help="1: with the CUDA extension")
    arguments = parser.parse_args()
    print(f"{arguments.wheel.name}: {arguments.wheel.stat().st_size / 1e6:.1f} MB")
    with zipfile.ZipFile(arguments.wheel) as wheel:
        found = problems(wheel, arguments.tree, arguments.cuda == "1")
    if found:
        sys.exit("\n".join(["the wheel has problems:", *found]))


if __name__ == "__main__":
    main()
