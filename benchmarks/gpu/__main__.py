"""All tests and measurements of the kernels on a GPU, in one command.

    python -m benchmarks.gpu --help

It needs a checkout, torch with CUDA and Triton; nothing is installed. Each section of
`cases.SECTIONS` runs in processes of its own (`watch.py`, `section.py`), and what it
found is written after every case.
"""

from __future__ import annotations

import benchmarks.gpu.checkout  # noqa: F401  (first: it makes the kernels importable)
import benchmarks.gpu.needed  # noqa: F401  (before what it looks for)

# isort: split
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from activedpo_fast._files import write_atomic
from benchmarks.gpu.aims import aims
from benchmarks.gpu.cases import SECTIONS, Found
from benchmarks.gpu.checkout import ROOT
from benchmarks.gpu.section import without_paths
from benchmarks.gpu.tables import summary
from benchmarks.gpu.watch import run, section_process
from benchmarks.gpu.wheels import unpack

RESERVE = 10.0  # seconds kept for the end
PACKAGES = ("torch", "triton", "transformers", "peft")
Result = dict[str, Any]


def describe(device: str, commit: str | None) -> Result:
    """What the figures depend on, besides the code."""
    versions = {"python": platform.python_version(), "CUDA of torch": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": _device() if device == "cuda" else {"name": "CPU, dry run"},
        "versions": versions,
        "cores": len(os.sched_getaffinity(0)),
        "date": datetime.date.today().isoformat(),
        "commit": commit or _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")) if _git("rev-parse", "HEAD") else None,
    }


def _device() -> Result:
    properties = torch.cuda.get_device_properties(0)
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "memory_gib": properties.total_memory / 2**30,
        "driver": driver.splitlines()[0] if driver else None,
    }


def _git(*arguments: str) -> str | None:
    return _said("git", "-C", str(ROOT), *arguments)


def _said(*command: str) -> str | None:
    """The output of a command; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def file_name(device: str) -> str:
    """gpu_nvidia_h100_80gb_hbm3.json"""
    return f"gpu_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


def begun(path: Path, described: Result) -> Result:
    """The result to add to: that in `path`, if it is for the same device and versions."""
    if path.exists():
        earlier = json.loads(path.read_text())
        if all(earlier[name] == described[name] for name in ("dry_run", "device", "versions")):
            return {**described, "sections": earlier["sections"]}
    return {**described, "aims": [], "sections": {}}


def measure(
    names: list[str],
    result: Result,
    path: Path,
    device: str,
    tiny: bool,
    minutes: float,
    environment: Mapping[str, str],
) -> None:
    """Run the sections one after another; `path` always has the results so far."""
    end = time.time() + 60 * minutes - RESERVE

    def write() -> None:
        write_atomic(path, without_paths(json.dumps(result, indent=1, ensure_ascii=False)) + "\n")

    write()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            started = time.time()
            deadline = min(end, started + 60 * minutes * SECTIONS[name].share)
            section: Result = {
                "title": SECTIONS[name].title,
                "commit": result["commit"],
                "date": result["date"],
                "cases": {},
            }
            result["sections"][name] = section
            print(
                f"{name}: {SECTIONS[name].title}, until {max(0.0, deadline - started):.0f} s",
                file=sys.stderr,
                flush=True,
            )

            def changed(found: Found, section: Result = section) -> None:
                section["cases"] = found
                write()

            child = section_process(name, Path(folder), device, deadline, tiny, environment)
            run(child, deadline, changed)
            section["seconds"] = round(time.time() - started, 1)
            result["aims"] = aims(result["sections"])
            write()


def main(
    out: Annotated[Path, typer.Option(help="The folder for the JSON, gpu_<device>.json.")],
    only: Annotated[
        str, typer.Option(help="Sections, comma-separated.", metavar="NAMES")
    ] = ",".join(SECTIONS),
    minutes: Annotated[
        float,
        typer.Option(min=0.1, help="The whole time; what would not fit is left out, and said."),
    ] = 9.0,
    wheels: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="A folder of wheels for packages that are not installed (peft, psutil).",
        ),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="What is measured, where the checkout has no .git.")
    ] = None,
    device: Annotated[str, typer.Option(help='"cuda"; "cpu" with --tiny.')] = "cuda",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A dry run in small on the CPU: no result.")
    ] = False,
) -> None:
    """Build the extensions in place, run the tests marked gpu, and measure the kernels.

    Sections: build (C++ and CUDA), compile (Triton), tests, selection, end_to_end (gradient rows of
    whole models), micro (kernels beside floors and peers). Each is independent: what fails is
    recorded, and the next goes on. Sections that OUT has of the same device stay, unless measured.
    """
    if unknown := sorted({*only.split(",")} - {*SECTIONS}):
        raise typer.BadParameter(
            f"unknown section {', '.join(unknown)}; known: {', '.join(SECTIONS)}"
        )
    names = [name for name in SECTIONS if name in only.split(",")]
    if device not in ("cpu", "cuda") or (device == "cpu") != tiny:
        raise typer.BadParameter("--device is cuda, or cpu together with --tiny")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device; --device cpu --tiny is a dry run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the section's process ends
    with tempfile.TemporaryDirectory() as site:
        brought = unpack(wheels, Path(site)) if wheels else []
        sys.path.append(site)
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            part for part in (os.environ.get("PYTHONPATH"), site) if part
        )
        if device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        described = {
            "dry_run": tiny,
            **describe(device, commit),
            "wheels": brought,
            "minutes": minutes,
        }
        path = out / ("gpu_dry_run.json" if tiny else file_name(described["device"]["name"]))
        result = begun(path, described)
        measure(names, result, path, device, tiny, minutes, environment)
    print(summary(result))
    print(f"written: {path}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(
        epilog="Examples:\n\n"
        "  python -m benchmarks.gpu --out benchmarks/results\n\n"
        "  python -m benchmarks.gpu --out found --only micro,selection\n\n"
        "  python -m benchmarks.gpu --out found --wheels wheelhouse --minutes 9\n\n"
        "  python -m benchmarks.gpu --out /tmp/dry --device cpu --tiny"
    )(main)
    app()
