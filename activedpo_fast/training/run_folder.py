"""A run's files on disk: records, labels, adapters and timings of its rounds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from activedpo_fast._files import (
    checksum_of_file,
    is_temporary,
    read_checked_json,
    sync,
    temporary_name,
    write_checked_json,
)
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.reading import SKIP
from activedpo_fast.selection.picks_jsonl import pick_line
from activedpo_fast.selection.result import Selection
from activedpo_fast.training.checksums import check, record, write_recorded

_STEMS = ("adapter", "checksums", "config", "labels", "picked", "pool", "record", "seconds")
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
    records = [read_record(path) for path in paths if path.exists()]
    if not records:
        raise ActiveDPOError(f"{folder}: no records of a run")
    return records


def read_record(path: Path) -> RoundRecord:
    """Read what `write_record` wrote.

    Raises:
        ActiveDPOError: the file is damaged, or another version of this library wrote it.
    """
    value = read_checked_json(path)
    names = {entry.name for entry in fields(RoundRecord)}
    if value.keys() != names or not isinstance(value["seconds"], dict):
        differing = sorted(value.keys() ^ names) or ["seconds"]
        raise ActiveDPOError(
            f"{path}: {differing[0]!r} is missing or unknown: another version of activedpo-fast "
            "wrote it; use that one, or another output_dir"
        )
    return RoundRecord(**value)


def write_record(path: Path, record: RoundRecord) -> None:
    write_checked_json(path, asdict(record))


def write_labels(path: Path, picked: Selection, labels: Sequence[int | None]) -> None:
    lines = (
        pick_line(pick, label=SKIP if label is None else label)
        for pick, label in zip(picked, labels, strict=True)
    )
    write_recorded(path, "".join(lines).encode())


def remove_leftovers(output_dir: Path) -> None:
    """Remove what killed processes left in a run's folder; only while it is locked."""
    for folder in (output_dir, output_dir / "start", *output_dir.glob("round-*")):
        for path in folder.iterdir() if folder.is_dir() else ():
            if not is_temporary(path.name, *_STEMS):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save both with `save_pretrained` to a temporary folder, then rename it.

    Features of this adapter need this tokenizer, which may differ from the base model's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / temporary_name(folder)
    temporary.mkdir()
    try:
        model.save_pretrained(
            str(temporary), selected_adapters=["default"], save_embedding_layers=False
        )
        tokenizer.save_pretrained(str(temporary))
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        record(
            folder.parent,
            {
                f"{folder.name}/{path.name}": checksum_of_file(path)
                for path in temporary.iterdir()
                if path.is_file()
            },
        )
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that `save_adapter` wrote to a folder's `adapter/`, on the CPU."""
    path = folder / "adapter" / "adapter_model.safetensors"
    check(folder, "adapter")
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
    write_checked_json(folder / "seconds.json", {**read_seconds(folder), **seconds})


def read_seconds(folder: Path) -> dict[str, float]:
    path = folder / "seconds.json"
    return read_checked_json(path) if path.exists() else {}
