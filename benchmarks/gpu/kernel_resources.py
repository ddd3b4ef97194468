"""The GPU resources that the Triton kernels need, found by compiling them on a machine without a
GPU.

    python -m benchmarks.gpu.kernel_resources                  every kernel for sm_80, sm_90, sm_100
    python -m benchmarks.gpu.kernel_resources --arch 90 --json resources.json
    python -m benchmarks.gpu.kernel_resources --module activedpo_fast.kernels.lora_grad_sketch

Every variant of activedpo_fast.kernels.variants is compiled as at its launch, and cuobjdump, which
is inside Triton's package, reads the binary. Columns: registers per thread; bytes of stack per
thread (spilled registers); KiB of shared memory and columns of tensor memory a block; tensor-core
instructions among all; warps that a multiprocessor holds at a time, of those that it has room for.
Nothing of this tells how fast a kernel is.

Exits with 1 where a kernel does not compile, spills, does not fit, or leaves the tensor cores idle
in a product of 16-bit numbers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from tqdm import tqdm

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.kernels import interpreted, why_not
from activedpo_fast.kernels.variants import LAUNCH, Variant, all_variants


@dataclass(frozen=True)
class Limits:
    """The resources of a GPU (CUDA programming guide, technical specifications by compute
    capability)."""

    shared: int  # KiB of shared memory that a block may have; a multiprocessor has one more
    warps: int  # resident warps of one multiprocessor
    blocks: int  # resident blocks of one multiprocessor
    # Bytes of a thread's stack that are not counted as a problem. Tiles were chosen by time on
    # sm_90, where a few numbers may be kept outside of loops; elsewhere, two blocks a
    # multiprocessor matter more.
    spilled: int = 168


LIMITS = {
    80: Limits(163, 64, 32),
    86: Limits(99, 48, 16),
    89: Limits(99, 48, 24),
    90: Limits(227, 64, 32, spilled=16),
    100: Limits(227, 64, 32),
    120: Limits(99, 48, 24),
}
ARCHS = [80, 90, 100]
SMALLEST_SHARED = 99  # KiB: consumer GPUs of sm_86, sm_89 and sm_120
RESERVED = 1024  # bytes of shared memory that the system takes for each block
REGISTERS = 16384  # of each quarter of a multiprocessor; a warp gets them in steps of 256
TENSOR_MEMORY = 512  # columns, of one multiprocessor of sm_100
# Ampere, Hopper and Blackwell: HMMA.16816.F32.BF16, HGMMA.64x64x16.F32.BF16, UTCHMMA.
TENSOR_INSTRUCTION = re.compile(r"^(?:[HIDQO]MMA|[HIQ]GMMA|UTC\w*MMA)\b")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
COMPLAINT = re.compile(r"Assertion|\berror:|LLVM ERROR")
DOT = re.compile(r"\btt\.dot [^:]*: tensor<[\dx]+x(\w+)>")


class Task(NamedTuple):
    """One variant of a module (None: of all), for one architecture."""

    module: str | None
    number: int
    arch: int

    def variant(self) -> Variant:
        return _variants(self.module)[self.number]

    def log(self, folder: str) -> Path:
        """The file for the compiler's output; it exists once the work has begun."""
        return Path(folder) / f"{self.number}-{self.arch}.log"


@dataclass(frozen=True)
class Resources:
    """One variant compiled for one architecture; where it was not, `error` says why."""

    name: str
    arch: int
    warps: int = 0  # of a block
    registers: int = 0  # of a thread
    stack: int = 0  # bytes of a thread
    shared: int = 0  # bytes of a block
    tensor_memory: int = 0  # columns of a block
    instructions: int = 0
    tensor_instructions: int = 0
    dots: list[str] = field(default_factory=list)  # the operands' types: "bf16", "f32"
    error: str = ""

    @property
    def resident_warps(self) -> int:
        """Warps that one multiprocessor holds at a time; 0 where not even a block fits."""
        if self.error:
            return 0
        limits = LIMITS[self.arch]
        warp_registers = max(-(-self.registers * 32 // 256) * 256, 256)
        blocks = min(
            limits.blocks,
            limits.warps // self.warps,
            REGISTERS // warp_registers * 4 // self.warps,
            (limits.shared + 1) * 1024 // (self.shared + RESERVED),
        )
        if self.tensor_memory:
            blocks = min(blocks, TENSOR_MEMORY // self.tensor_memory)
        return blocks * self.warps

    def problems(self) -> list[str]:
        """The reasons why this variant cannot be launched, or is not efficient; empty if there are
        none."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.stack > LIMITS[self.arch].spilled:
            found.append(f"spills registers: {self.stack} bytes of stack a thread")
        limit = LIMITS[self.arch].shared
        if self.shared > limit * 1024:
            found.append(
                f"needs {self.shared / 1024:.1f} KiB of shared memory a block, over the "
                f"{limit} KiB of sm_{self.arch}"
            )
        elif not self.resident_warps:
            found.append(
                f"a block of {self.warps} warps with {self.registers} registers a thread "
                "does not fit into a multiprocessor"
            )
        if not self.tensor_instructions and {"bf16", "f16"} & set(self.dots):
            found.append("multiplies 16-bit numbers without tensor cores")
        return found


def compile_all(
    archs: list[int], module: str | None, jobs: int, skip: Iterable[str] = ()
) -> list[Resources]:
    """The variants of a module (None: of all) for each architecture, in order, by `jobs` processes.

    skip: each leaves out the variants whose name has all of its words.

    Raises ActiveDPOError where kernels cannot be compiled here, or an architecture is unknown.
    """
    if unknown := sorted(set(archs) - set(LIMITS)):
        raise ActiveDPOError(
            f"no limits are known of sm_{unknown[0]}; known: "
            f"{', '.join(f'sm_{arch}' for arch in LIMITS)}"
        )
    if missing := why_not():
        raise ActiveDPOError(missing)
    if interpreted():
        raise ActiveDPOError("TRITON_INTERPRET is set, so kernels are interpreted and not compiled")
    cuobjdump()
    left = [
        Task(module, number, arch)
        for number, variant in enumerate(_variants(module))
        if not any({*words.split()} <= {*variant.name.split()} for words in skip)
        for arch in archs
    ]
    order, found = list(left), {}
    with (
        tempfile.TemporaryDirectory() as logs,
        tqdm(desc="compiling", total=len(left), leave=False, disable=None) as bar,
    ):
        while left:
            for task, result in _in_processes(left, jobs, logs):
                found[task] = result
                bar.update()
            # If the compiler itself crashes, on an assertion, it ends the whole pool of processes:
            # the tasks that had begun are tried one by one, and then the rest.
            begun = [task for task in left if task not in found and task.log(logs).exists()]
            for task in begun:
                results = [result for _, result in _in_processes([task], 1, logs)]
                found[task] = (
                    results[0]
                    if results
                    else Resources(
                        task.variant().name,
                        task.arch,
                        error=f"the compiler's process died {_complaint(task.log(logs))}".rstrip(),
                    )
                )
                bar.update()
            rest = [task for task in left if task not in found]
            if rest == left:
                raise ActiveDPOError("no process that compiles kernels can be started")
            left = rest
    return [found[task] for task in order]


def _in_processes(tasks: list[Task], jobs: int, logs: str) -> Iterator[tuple[Task, Resources]]:
    """Results as they arrive; fewer than tasks if a process died."""
    # Processes, as most of compiling holds the interpreter's lock; spawned, as Triton has threads.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, task, logs): task for task in tasks}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield futures[future], future.result()


@cache
def cuobjdump() -> str:
    """The path of cuobjdump: Triton's own, or the PATH's."""
    import triton

    own = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(own) if own.exists() else shutil.which("cuobjdump")
    if not found:
        raise ActiveDPOError(
            "cuobjdump is neither in Triton's package nor on the PATH; install "
            "triton from PyPI, or NVIDIA's package cuda-cuobjdump"
        )
    return found


def _variants(module: str | None) -> list[Variant]:
    return import_module(module).variants() if module else all_variants()


def _compile(task: Task, logs: str) -> Resources:
    """The work of a process: variants cannot be sent to it, so it takes them from their module."""
    with task.log(logs).open("w") as log:  # if a pass fails, Triton prints thousands of lines
        os.dup2(log.fileno(), 2)
    variant = task.variant()
    try:
        return resources(variant, task.arch)
    except Exception as error:  # the compiler raises all kinds; the run goes on to the next kernel
        why = " | ".join(line.strip() for line in str(error).splitlines() if line.strip())
        said = _complaint(task.log(logs))
        return Resources(
            variant.name,
            task.arch,
            error=f"{type(error).__name__}: {why[:400]}{f' ({said})' if said else ''}",
        )


def _complaint(log: Path) -> str:
    """The first line of the compiler's output that speaks of an error; empty if there is none."""
    with log.open(errors="replace") as lines:
        return next((line.strip()[:400] for line in lines if COMPLAINT.search(line)), "")


def resources(variant: Variant, arch: int) -> Resources:
    """Compile one variant as its launch would, and read the resources that it needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = list(variant.signature)
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constants,
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "maxnreg": variant.maxnreg,
            **LAUNCH,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        listing = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", "--dump-sass", binary],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = USAGE.search(listing)
    if usage is None:
        raise RuntimeError("cuobjdump names no resources")
    registers, stack, static_shared, local = map(int, usage.groups())
    instructions = INSTRUCTION.findall(listing)
    metadata: Any = compiled.metadata
    return Resources(
        variant.name,
        arch,
        warps=metadata.num_warps,
        registers=registers,
        stack=stack + local,
        shared=metadata.shared + max(static_shared - (RESERVED if arch >= 90 else 0), 0),
        tensor_memory=getattr(metadata, "tmem_size", 0) or 0,
        instructions=len(instructions),
        tensor_instructions=sum(bool(TENSOR_INSTRUCTION.match(name)) for name in instructions),
        dots=sorted(set(DOT.findall(compiled.asm["ttir"]))),
    )


def table(found: list[Resources]) -> Iterator[str]:
    """Lines of a table, a row for each variant and architecture, with its problems at the end."""
    width = max((len(each.name) for each in found), default=0)
    yield (
        f"{'kernel':{width}}  arch  warps  registers  stack  shared  tmem  tensor/instructions"
        "  resident warps"
    )
    for each in found:
        start = f"{each.name:{width}}  {each.arch:>4}"
        if not each.error:
            tensor = f"{each.tensor_instructions}/{each.instructions}"
            resident = f"{each.resident_warps} of {LIMITS[each.arch].warps}"
            start += (
                f"  {each.warps:>5}  {each.registers:>9}  {each.stack:>5}  "
                f"{each.shared / 1024:>6.1f}  {each.tensor_memory:>4}  {tensor:>19}  "
                f"{resident:>14}"
            )
        yield "  ".join([start, *each.problems()])


def main(
    arch: Annotated[
        list[int], typer.Option(help="a compute capability without its point; may be repeated")
    ] = ARCHS,
    module: Annotated[
        str | None, typer.Option(help="only the kernels of this module, by its variants()")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="leave out kernels with all of these words in the name, as 'fp32 fast'; may be "
            "repeated"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 2,
    output: Annotated[Path | None, typer.Option("--json", help="write the findings here")] = None,
) -> None:
    """Compile the GPU kernels without a GPU and print the resources that each needs."""
    try:
        found = compile_all(arch, module, jobs, skip or ())
    except ActiveDPOError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    from triton import __version__ as triton_version

    for line in table(found):
        typer.echo(line)
    large = sorted({each.name for each in found if each.shared > SMALLEST_SHARED * 1024})
    if large:
        typer.echo(
            f"\nover the {SMALLEST_SHARED} KiB of shared memory that a block may have on "
            f"sm_86, sm_89 and sm_120: {', '.join(large)}"
        )
    bad = sum(bool(each.problems()) for each in found)
    typer.echo(f"\ntriton {triton_version}: {len(found)} binaries, {bad} with problems")
    if output:
        rows = [
            {**asdict(each), "resident_warps": each.resident_warps, "problems": each.problems()}
            for each in found
        ]
        output.write_text(json.dumps({"triton": triton_version, "kernels": rows}, indent=1) + "\n")
    raise typer.Exit(bool(bad))


if __name__ == "__main__":
    typer.run(main)
