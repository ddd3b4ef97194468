"""A run's folder read for a report: as far as it goes, with a line for everything missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from activedpo_fast._files import first_line, read_checked_json, read_json
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.reading import read_label
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.texts import canonical_json
from activedpo_fast.report.compute import Tokens, count_tokens
from activedpo_fast.selection.picks_jsonl import Pick, read_picks
from activedpo_fast.selection.strategies import STRATEGIES
from activedpo_fast.training.checksums import check
from activedpo_fast.training.run_folder import (
    START,
    RoundRecord,
    read_command,
    read_record,
    round_folder,
    round_folders,
)

T = TypeVar("T")
Label = int | str  # 0, 1, "tie" or "skip"


@dataclass(frozen=True)
class Answer:
    """What one labeler said about a pair.

    Attributes:
        label: 0, 1, "tie" or "skip".
        labeler: a name; None if the file has none.
        seconds: for how long the labeler looked at the pair.
        time: when, as in the file.
    """

    label: Label
    labeler: str | None = None
    seconds: float | None = None
    time: str | None = None


# By pair: the label that a file for people has, and the answers it was made from.
Answers = dict[bytes, tuple[Any, tuple[Answer, ...]]]


@dataclass(frozen=True)
class LabeledPick:
    """A pick of a round with its label (None: not labeled yet) and the answers it was made from."""

    round: int
    pick: Pick
    label: Label | None
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class RoundData:
    """What is on disk of a round; `pool` is None, and `picks` is empty, if it is not there."""

    number: int
    pool: PreferencePool | None
    picks: list[LabeledPick]


@dataclass
class RunData:
    """A run.

    Attributes:
        name: the folder's name, or its path if several runs have that name.
        settings, versions: of `config.json`; empty if it cannot be read.
        records: of the start and of the complete rounds.
        rounds: everything that was begun.
        tokens: by stage for each labeled round; None if they cannot be counted.
        command: how the command line began the run; None if a script did.
        missing: one line for everything that is unfinished or cannot be read.
    """

    folder: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    records: list[RoundRecord] = field(default_factory=list)
    rounds: list[RoundData] = field(default_factory=list)
    tokens: list[dict[str, Tokens]] | None = None
    command: str | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def strategy(self) -> str:
        given = self.settings.get("strategy", "unknown")
        return str(given.get("name", "unknown") if isinstance(given, dict) else given)

    @property
    def picks(self) -> list[LabeledPick]:
        return [pick for data in self.rounds for pick in data.picks]

    @property
    def metrics(self) -> list[str]:
        return metric_names(self.records)


def read_runs(folders: list[Path]) -> list[RunData]:
    """Read the folders of runs.

    Raises:
        ActiveDPOError: one of them is not the folder of a run, or is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ActiveDPOError("RUN: a folder is given twice")
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> RunData:
    """Read one run; see `read_runs`."""
    _check_is_run(folder)
    run = RunData(folder, name)
    run.command = _try(run, partial(read_command, folder))
    config = _try(run, lambda: read_checked_json(folder / "config.json")) or {}
    run.settings = _section(run, config, "settings")
    run.versions = _section(run, config, "versions")
    for section in run.settings.keys() & {"dpo", "lora", "extra_settings"}:
        run.settings[section] = _section(run, run.settings, section)
    start = _record(run, folder / "start")
    run.records += [start] if start is not None else []
    answers = _answers(run)
    folders = round_folders(folder)
    gone = sorted(set(range(max(folders, default=0))) - folders.keys())
    run.missing += [f"{round_folder(folder, number).name} is gone" for number in gone]
    for number, path in folders.items():
        run.rounds.append(_round(run, number, path, answers))
        record = _record(run, path)
        run.records += [record] if record is not None else []
    if not folders:
        run.missing.append("no round was begun")
    run.tokens = None if gone else _tokens(run)  # they are counted from the first round on
    return run


def _check_is_run(folder: Path) -> None:
    if not folder.is_dir():
        raise ActiveDPOError(f"{folder}: no such folder")
    config = folder / "config.json"
    if (config.exists() and not _is_of_model(config)) or round_folders(folder):
        return
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    hint = f"; it has these runs: {' '.join(map(str, inside))}" if inside else ""
    why = "its config.json is a model's" if config.exists() else "no config.json"
    raise ActiveDPOError(f"{folder}: not the folder of a run ({why}){hint}")


def _is_of_model(config: Path) -> bool:
    try:
        found = read_json(config)
    except ActiveDPOError:
        return False
    return isinstance(found, dict) and "model_type" in found


def _try(run: RunData, read: Callable[[], T]) -> T | None:
    """Return what `read` returns; if it fails, note the reason and return None."""
    try:
        return read()
    except ActiveDPOError as error:
        run.missing.append(str(error))
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # other JSON than ours
        run.missing.append(f"{run.folder}: not understood ({type(error).__name__}: {error})")
    return None


def _section(run: RunData, values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a copy of an object of `config.json`; an empty one, noted, if it is something else."""
    found = values.get(name)
    if not isinstance(found, dict | None):
        run.missing.append(f"{run.folder / 'config.json'}: {name!r} is no object")
        return {}
    return dict(found or {})


def _record(run: RunData, folder: Path) -> RoundRecord | None:
    path = folder / "record.json"
    if path.exists():
        return _try(run, lambda: read_record(path))
    stages = (
        ("pool.jsonl", "it has no responses"),
        ("picked.jsonl", "no pairs are picked"),
        ("labels.jsonl", "its pairs are not labeled"),
        ("adapter", "it is not trained"),
    )
    wanted = stages if folder.name != "start" else ()
    lacking = (what for name, what in wanted if not (folder / name).exists())
    run.missing.append(f"{folder.name} is unfinished: {next(lacking, 'it is not evaluated')}")
    return None


def _round(run: RunData, number: int, folder: Path, answers: Answers) -> RoundData:
    pool, picks = folder / "pool.jsonl", []
    labels = folder / "labels.jsonl"
    source = labels if labels.exists() else folder / "picked.jsonl"
    if source.exists():
        if labels.exists():
            _try(run, lambda: check(folder, labels.name))
        for place, pick, row in _try(run, lambda: read_picks(source)) or ():
            label = _label(run, row, place) if source == labels else None
            people, said = answers.get(_key(pick), (None, ()))
            if (label, people) == ("skip", "tie"):
                label = "tie"  # the run's own file does not tell them apart
            picks.append(LabeledPick(number, pick, label, said))
    return RoundData(
        number, _try(run, lambda: PreferencePool.from_jsonl(pool)) if pool.exists() else None, picks
    )


def _label(run: RunData, row: dict[str, Any], place: str) -> Label | None:
    """Return the label of a line of the run's own file; None, noted as missing, for a bad one."""
    if "label" not in row:
        run.missing.append(f"{place}: no 'label'")
        return None
    if row["label"] is None:
        return "skip"  # as an earlier version wrote it
    return _try(run, lambda: read_label(row, place))


def _answers(run: RunData) -> Answers:
    """Return what people said about each pair, from the files they filled in."""
    found: Answers = {}
    # Files called labels-... come last: they take precedence, as for the run.
    files = sorted((run.folder / "labeling").glob("*.jsonl"), key=lambda path: path.name[0] == "l")
    for path in files:
        if path.name.endswith(".journal.jsonl"):  # what the labels were made from
            continue
        for place, pick, row in _try(run, partial(read_picks, path)) or ():
            said = tuple(_try(run, partial(_said, row, place)) or ())
            if said:
                found[_key(pick)] = (row.get("label"), said)
    return found


def _said(row: dict[str, Any], place: str) -> list[Answer]:
    """Return the answers of a line; those without a label are left out.

    Raises:
        ActiveDPOError: they are not as this library writes them; names `place`.
    """
    answers = row.get("answers") or [row]
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise ActiveDPOError(f"{place}: 'answers' must be a list of objects")
    found = []
    for answer in answers:
        if read_label(answer, place) is None:
            continue
        labeler, seconds = answer.get("labeler"), answer.get("seconds")
        if not isinstance(labeler, str | None):
            raise ActiveDPOError(f"{place}: 'labeler' must be a text")
        if seconds is not None and (
            type(seconds) not in (int, float) or not 0 <= seconds < math.inf
        ):
            raise ActiveDPOError(f"{place}: 'seconds' must be a number from 0")
        label = answer["label"]
        found.append(
            Answer(
                int(label) if isinstance(label, float) else label,
                labeler,
                None if seconds is None else float(min(seconds, 1e9)),
                answer.get("time"),
            )
        )
    return found


def _key(pick: Pick) -> bytes:
    return canonical_json([pick.id, pick.pair, pick.prompt, pick.responses])


def _tokens(run: RunData) -> list[dict[str, Tokens]] | None:
    """Count the run's tokens with its own tokenizer, or note why that is not possible."""
    if run.strategy not in STRATEGIES:
        run.missing.append(f"compute: what strategy {run.strategy!r} asks for is not known")
        return None
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(run.folder / "start" / "adapter"), local_files_only=True
        )
    except Exception as error:  # depends on what is wrong with the folder
        reason = first_line(error)
        run.missing.append(
            f"compute: no tokenizer in {run.folder / 'start' / 'adapter'} ({reason})"
        )
        return None
    return _try(run, lambda: _count(run, tokenizer))


def _count(run: RunData, tokenizer: Any) -> list[dict[str, Tokens]]:
    dpo = run.settings.get("dpo", {})
    steps = dpo.get("max_steps", -1)
    batch = dpo.get("per_device_train_batch_size", 8) * dpo.get("gradient_accumulation_steps", 1)
    return count_tokens(
        run.folder,
        tokenizer,
        STRATEGIES[run.strategy].requires,
        epochs=dpo["num_train_epochs"],
        pairs_per_round=steps * batch if steps > 0 else None,
        train_on=run.settings["train_on"],
        generated=run.settings["responses"] == "sampled",
    )


def points(run: RunData, metric: str) -> list[tuple[RoundRecord, float, float | None]]:
    """Return (record, value, standard error or None) of every record that has the metric."""
    return [
        (record, record.metrics[metric], record.metrics.get(f"{metric}_se"))
        for record in run.records
        if metric in record.metrics
    ]


def metric_names(records: Iterable[RoundRecord]) -> list[str]:
    """Return the names of the metrics, without their standard errors (`<name>_se`)."""
    names = dict.fromkeys(name for record in records for name in record.metrics)
    return [name for name in names if not (name.endswith("_se") and name[:-3] in names)]


def round_name(number: int) -> str:
    return "start" if number == START else str(number)
