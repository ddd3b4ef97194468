"""A run's files on disk: records, labels, adapters and timings of its rounds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from activedpo_fast._files import read_json, sync, temporary_name, write_atomic, write_json
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.reading import SKIP
from activedpo_fast.selection.picks_jsonl import pick_line
from activedpo_fast.selection.result import Selection

START = -1  # `round` in the record of the start


@dataclass
class RoundRecord:
    """The cost and the results of a round.

    Attributes:
        round: 0, 1, ...; -1 for the record of the start, before any label.
        labels_total: labels so far including this round's, without "no preference".
        metrics: from `evaluate`, after this round's training.
        seconds: by stage: generate, features, select, label, train, evaluate.
        strategy: the strategy of this round's selection.

    Examples:
        >>> start, first = loop.run()
        >>> start.round, start.labels_total
        (-1, 0)
        >>> first.round, first.labels_total
        (0, 2)
        >>> sorted(first.seconds)
        ['evaluate', 'features', 'generate', 'label', 'select', 'train']
    """

    round: int
    labels_total: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    strategy: str = ""


def read_records(output_dir: str | Path) -> list[RoundRecord]:
    """Return the records of the start and of the complete rounds of a run, in order."""
    folder = Path(output_dir)
    paths = [folder / "start" / "record.json", *sorted(folder.glob("round-*/record.json"))]
    records = [RoundRecord(**read_json(path)) for path in paths if path.exists()]
    if not records:
        raise ActiveDPOError(f"{folder}: no records of a run")
    return records


def write_labels(path: Path, picked: Selection, labels: Sequence[int | None]) -> None:
    write_atomic(
        path,
        "".join(
            pick_line(pick, label=SKIP if label is None else label)
            for pick, label in zip(picked, labels, strict=True)
        ),
    )


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save both with `save_pretrained` to a temporary folder, then rename it.

    Features of this adapter need this tokenizer, which may differ from the base model's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".adapter-*"):  # left by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder.parent / temporary_name(folder)
    temporary.mkdir()
    try:
        model.save_pretrained(
            str(temporary), selected_adapters=["default"], save_embedding_layers=False
        )
        tokenizer.save_pretrained(str(temporary))
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that `save_adapter` wrote to a folder's `adapter/`, on the CPU."""
    path = folder / "adapter" / "adapter_model.safetensors"
    if not path.is_file():
        raise ActiveDPOError(
            f"{path} is gone, which the run goes on from: put it back, or use another output_dir"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ActiveDPOError(
            f"{path} cannot be read ({error}): put it back, or use another output_dir"
        ) from None


@contextmanager
def timed(folder: Path, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    add_seconds(folder, {stage: time.perf_counter() - started})


def add_seconds(folder: Path, seconds: Mapping[str, float]) -> None:
    write_json(folder / "seconds.json", {**read_seconds(folder), **seconds})


def read_seconds(folder: Path) -> dict[str, float]:
    path = folder / "seconds.json"
    return read_json(path) if path.exists() else {}
