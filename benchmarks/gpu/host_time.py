"""The CPU's time to capture and sketch a batch of Llama 7B, without a GPU.

    python -m benchmarks.gpu.host_time --out benchmarks/results/host_time.json

A chain of as many LoRA matrices as q, k, v and o of 32 layers have runs forward and back as a batch
of prompts with two responses each does. Its tensors are so small that arithmetic takes no time, and
the kernels' host functions prepare every launch, which is then counted and not made: what a launch
itself takes is not in these figures. The floor is the same passes with hooks that capture nothing.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: there may be no GPU
os.environ["ACTIVEDPO_BACKEND"] = "triton"

# isort: split
import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from torch import Tensor, nn
from triton.runtime.interpreter import InterpretedFunction

from activedpo_fast import Sketch
from activedpo_fast._files import write_atomic
from activedpo_fast.gradients.hooks import Capture
from activedpo_fast.gradients.layers import TrainableLinear
from activedpo_fast.gradients.sketch import SketchPlan
from activedpo_fast.gradients.sketching import ASIDE, Sketching
from benchmarks.machine import describe_run
from benchmarks.rows.floor import OnlyActivations

ADAPTERS, RANK = 4 * 32, 16
PROMPTS, RESPONSES = 10, 20  # of a batch of 4,300 tokens, below
PASSES = 2  # back through the prompts, one per response of each
# The width of the model and the lengths of prompts and responses: as they are, and here.
REAL, SMALL = (4096, 350, 40), (64, 7, 1)
Figures = dict[str, float]


class TimedSketching(Sketching):
    """What `Sketching` does, with the time that it takes to prepare launches.

    It puts aside as many layers as it would of the real widths and lengths.
    """

    def __init__(self, plan: SketchPlan, out: Tensor) -> None:
        (real_width, real_length, _), (width, length, _) = REAL, SMALL
        scale = (width + RANK) * length / ((real_width + RANK) * real_length)
        super().__init__(plan, out, int(ASIDE * scale))
        self.seconds = 0.0

    def finish(self) -> None:
        started = time.process_time()
        super().finish()
        self.seconds += time.process_time() - started


class Batch:
    """The adapters, one after the other, and the passes of a batch."""

    def __init__(self, method: str) -> None:
        width = SMALL[0]
        self.adapters = [
            (nn.Linear(width, RANK, bias=False), nn.Linear(RANK, width, bias=False))
            for _ in range(ADAPTERS)
        ]
        self.layers = [
            TrainableLinear(matrix.requires_grad_(False), f"{i}.lora_{name}.weight", None)
            for i, pair in enumerate(self.adapters)
            for name, matrix in zip("AB", pair, strict=True)
        ]
        shapes = [
            (f"{i}.lora_{name}.weight", matrix.weight.shape)
            for i, pair in enumerate(self.adapters)
            for name, matrix in zip("AB", pair, strict=True)
        ]
        self.plan = SketchPlan(Sketch(method), shapes)

    def run(self, way: type[Capture]) -> Figures:
        """Return seconds of the forward passes, of the backward passes, and within these of
        preparing launches."""
        width, prompt, response = SMALL
        rows = torch.zeros(RESPONSES, self.plan.dim, dtype=torch.float64)
        sketching = TimedSketching(self.plan, rows)
        forward = backward = 0.0
        with way(self.layers, sketching) as capture:
            for count, length, passes in ((PROMPTS, prompt, PASSES), (RESPONSES, response, 1)):
                segments = [
                    torch.tensor([[i * length, (i + 1) * length, i] for i in range(count)])
                    for _ in range(passes)
                ]
                x = torch.randn(count, length, width)
                started = time.process_time()
                with capture.forward((count, length)):
                    for a, b in self.adapters:
                        x = x + b(a(x))
                forward += time.process_time() - started
                started = time.process_time()
                for of_pass in segments:
                    with capture.backward(of_pass):
                        x.backward(torch.ones_like(x), retain_graph=True)
                backward += time.process_time() - started
        return {"forward": forward, "backward": backward, "launches": sketching.seconds}


@contextmanager
def launches_counted() -> Iterator[list[str]]:
    """Count kernels' launches instead of making them."""
    made: list[str] = []
    with patch.object(
        InterpretedFunction, "run", lambda self, *_, **__: made.append(self.fn.__name__)
    ):
        yield made


def measure(method: str, deterministic: bool, rounds: int) -> Figures:
    """Return the least time of `rounds` for each part, and the launches of a batch."""
    os.environ["ACTIVEDPO_DETERMINISTIC"] = str(int(deterministic))
    batch = Batch(method)
    with launches_counted() as made:
        found: dict[type[Capture], list[Figures]] = {Capture: [], OnlyActivations: []}
        for _ in range(rounds):
            for way, times in found.items():
                gc.collect()
                made.clear() if way is Capture else None
                times.append(batch.run(way))
                launches = len(made)
    least = {
        way: {part: min(one[part] for one in times) for part in times[0]}
        for way, times in found.items()
    }
    own, floor = least[Capture], least[OnlyActivations]
    hooks = len(batch.layers)
    forward = own["forward"] - floor["forward"]
    backward = own["backward"] - own["launches"] - floor["backward"]
    return {
        "forward_hook_us": 1e6 * forward / (2 * hooks),
        "backward_hook_us": 1e6 * backward / ((PASSES + 1) * hooks),
        "weight_of_a_launch_us": 1e6 * own["launches"] / ((PASSES + 1) * hooks),
        "batch_ms": 1e3 * (forward + backward + own["launches"]),
        "floor_ms": 1e3 * (floor["forward"] + floor["backward"]),
        "launches": launches,
    }


def main(
    rounds: Annotated[int, typer.Option(help="Rounds, of which the least time counts.")] = 30,
    out: Annotated[Path | None, typer.Option(help="JSON file to add this run to.")] = None,
    commit: Annotated[str, typer.Option(help="What was measured, for the file.")] = "",
) -> None:
    """Print the CPU's microseconds for each hook and for each weight of a launch."""
    torch.set_num_threads(1)
    figures = {
        f"{method}, {'the same bits on every run' if deterministic else 'fast'}": measure(
            method, deterministic, rounds
        )
        for method, deterministic in (("sjlt", False), ("sjlt", True), ("kronecker", False))
    }
    for name, found in figures.items():
        print(name, *(f"{key} {value:.4g}" for key, value in found.items()), sep="  ")
    if out is not None:
        run = {
            "commit": commit,
            "date": date.today().isoformat(),
            "machine": describe_run(),
            "rounds": rounds,
            "figures": figures,
        }
        runs = json.loads(out.read_text())["runs"] if out.exists() else []
        write_atomic(out, json.dumps({"runs": [*runs, run]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
