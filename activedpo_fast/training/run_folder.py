"""A run's files on disk: records, labels, adapters and timings of its rounds."""

from __future__ import annotations

import re
import shlex
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
    first_line,
    is_temporary,
    read_checked_json,
    reason_of,
    sync,
    temporary_name,
    write_checked_json,
)
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.reading import SKIP
from activedpo_fast.selection.picks_jsonl import pick_line
from activedpo_fast.selection.result import Selection
from activedpo_fast.training.checksums import check, record, write_recorded
from activedpo_fast.training.energy import metered

_COMMAND = "command.json"
_STEMS = (
    "adapter",
    "checksums",
    "command",
    "config",
    "heldout",
    "heldout-preferences",
    "heldout-responses",
    "joules",
    "labels",
    "picked",
    "pool",
    "record",
    "seconds",
    "training",
)
WEIGHTS = "adapter/adapter_model.safetensors"  # in the folder of the start or of a round
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
        training: of the trainer: its mean "loss", its "steps" and the "pairs" it trained on; empty
            at the start and in a round without a preference. With the trainer's own evaluation
            also its last "eval_loss", "eval_accuracy" and "eval_margin".
        gpu: the name of the GPU that the model was on; "" without one.
        joules: energy of that GPU by stage, as NVML counts it for the whole device; features are
            part of select. Empty if it is not known, for example without nvidia-ml-py.

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
    training: dict[str, float] = field(default_factory=dict)
    gpu: str = ""
    joules: dict[str, float] = field(default_factory=dict)

    @property
    def gpu_seconds(self) -> float | None:
        """The seconds of the stages that ran the model on a GPU; None without one."""
        if not self.gpu:
            return None
        return sum(seconds for stage, seconds in self.seconds.items() if stage != "label")


def round_folder(output_dir: Path, number: int) -> Path:
    return output_dir / f"round-{number:03d}"


def round_folders(output_dir: Path) -> dict[int, Path]:
    """Return the folders of a run's rounds by number, in order; somebody's copy of one is none."""
    found = {}
    for path in output_dir.glob("round-*"):
        digits = re.fullmatch(r"round-([0-9]{3,})", path.name)
        if digits and path == round_folder(output_dir, int(digits[1])) and path.is_dir():
            found[int(digits[1])] = path
    return dict(sorted(found.items()))


def folder_to_evaluate(output_dir: Path) -> Path:
    """Return the folder of the start or of the round whose record is the next to be written.

    Raises:
        ActiveDPOError: all are there.
    """
    folders = (output_dir / "start", *round_folders(output_dir).values())
    for folder in folders:
        if not (folder / "record.json").exists():
            return folder
    raise ActiveDPOError(f"{output_dir}: all rounds are evaluated")


def read_records(output_dir: str | Path) -> list[RoundRecord]:
    """Return the records of the start and of the complete rounds of a run, in order."""
    folder = Path(output_dir)
    paths = [path / "record.json" for path in (folder / "start", *round_folders(folder).values())]
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
    for folder in (output_dir, output_dir / "start", *round_folders(output_dir).values()):
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
        with _named_if_not_written(folder):
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
                for path in sorted(temporary.iterdir())  # file systems have orders of their own
                if path.is_file()
            },
        )
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _named_if_not_written(folder: Path) -> Iterator[None]:
    """Raise `ActiveDPOError` where a library could not write a file, because the disk is full."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise ActiveDPOError(
            f"{folder} cannot be written: its path is not UTF-8, which the libraries that save "
            "models and tokenizers need: use another output_dir"
        ) from error
    except Exception as error:
        # tokenizers has no type of its own for it.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        reason = reason_of(error) if isinstance(error, OSError) else first_line(error)
        raise ActiveDPOError(f"{folder} cannot be written: {reason}") from error


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that `save_adapter` wrote to a folder's `adapter/`, on the CPU."""
    check(folder, "adapter")
    return read_weights(folder / WEIGHTS)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a file of an adapter, on the CPU."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ActiveDPOError(
            f"{path} cannot be read ({error}): put it back, or use another output_dir"
        ) from None


@contextmanager
def timed(folder: Path, stage: str, device: torch.device | None = None) -> Iterator[None]:
    """Record the seconds of a stage and, if it runs on `device`, the joules where known."""
    started = time.perf_counter()
    with measured(folder, stage, device):
        yield
    add_seconds(folder, {stage: time.perf_counter() - started})


@contextmanager
def measured(folder: Path, stage: str, device: torch.device | None) -> Iterator[None]:
    """Record the joules of a stage, where known."""
    with metered(device or torch.device("cpu")) as energy:
        yield
    if energy:
        add_numbers(folder / "joules.json", {stage: energy["joules"]})


def add_seconds(folder: Path, seconds: Mapping[str, float]) -> None:
    add_numbers(folder / "seconds.json", seconds)


def add_numbers(path: Path, numbers: Mapping[str, float]) -> None:
    """Put numbers into a file like `seconds.json`, beside those that it has."""
    write_checked_json(path, {**read_numbers(path), **numbers})


def read_numbers(path: Path) -> dict[str, float]:
    """Return what a file like `seconds.json` has; nothing if there is none."""
    return read_checked_json(path) if path.exists() else {}


def steps_before(output_dir: Path, round_number: int) -> int:
    """Return the optimizer's steps of the rounds before one."""
    return sum(
        int(read_numbers(folder / "training.json").get("steps", 0))
        for number, folder in round_folders(output_dir).items()
        if number < round_number
    )


def write_command(output_dir: Path, command: str) -> None:
    """Record the command, and the folder that its paths start from, that continues a run."""
    write_checked_json(output_dir / _COMMAND, {"command": command, "folder": str(Path.cwd())})


def read_command(output_dir: Path) -> str | None:
    """Return the command line that continues a run; None if a script began it."""
    path = output_dir / _COMMAND
    if not path.exists():
        return None
    found = read_checked_json(path)
    return f"cd {shlex.quote(found['folder'])} && {found['command']}"
