"""Picks to the files of an annotation tool, and its answers to files of labels."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activedpo_fast._files import FilePath, check_file_target, check_folder_target, write_atomic
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.combine import COMBINERS, CombinedLabel
from activedpo_fast.labels.exchange import (
    argilla,
    distilabel,
    jsonl,
    label_studio,
    lmarena,
    potato,
    table,
)
from activedpo_fast.labels.exchange.answers import Found, Problem
from activedpo_fast.labels.exchange.matching import Label, match
from activedpo_fast.labels.exchange.reading import check_size
from activedpo_fast.labels.exchange.shown import ShownPick, json_text, show_picks
from activedpo_fast.selection.picks_jsonl import Pick, read_picks
from activedpo_fast.selection.result import keep_labels

_OPTIONAL = ("seconds", "comment", "strength")
_LONGEST_RECORD = 100_000  # characters of a set-aside record


@dataclass(frozen=True)
class Tool:
    """What is known about an annotation tool.

    Attributes:
        export: returns {file name: content}; the name is "" if the output is one file.
        answers: yields what a file or folder of the tool answers; the text is the labeler's name
            where the tool has none.
        suffix: how the name of the output ends if it is one file; "" for a folder.
    """

    export: Callable[[Sequence[ShownPick]], dict[str, str]]
    answers: Callable[[Path, str], Found]
    suffix: str


TOOLS: Mapping[str, Tool] = {
    "label-studio": Tool(label_studio.export, label_studio.answers, ""),
    "argilla": Tool(argilla.export, argilla.answers, ""),
    "potato": Tool(potato.export, potato.answers, ""),
    "potato-scale": Tool(potato.export_scale, potato.answers, ""),
    "distilabel": Tool(distilabel.export, distilabel.answers, ".jsonl"),
    "lmarena": Tool(lmarena.export, lmarena.answers, ".jsonl"),
    "csv": Tool(table.export, table.answers, ".csv"),
    "jsonl": Tool(jsonl.export, jsonl.answers, ".jsonl"),
}


@dataclass(frozen=True)
class Imported:
    """The result of `import_answers`.

    Attributes:
        files: the file of each labeler's labels.
        answered: how many picks each labeler answered, and how: {labeler: {label: number}}.
        picks: number of picks in the batch.
        unanswered: number of picks that nobody answered.
        set_aside: number of answers that were set aside.
        combined: with `combine`, how many picks have which label.
        split: with `combine`, how many are ties because two labels are equally likely.
    """

    files: dict[str, Path]
    answered: dict[str, Counter[int | str]]
    picks: int
    unanswered: int
    set_aside: int
    combined: Counter[int | str] | None = None
    split: int = 0


def export_picks(batch: FilePath, tool: str, output: FilePath, *, seed: int | None = 0) -> int:
    """Write the picks of a batch as a tool reads them, and return their number.

    Args:
        batch: a file of picks, as `Selection.to_jsonl` writes it.
        tool: a name in `TOOLS`.
        output: a folder, or a file for tools that read one file. A file that is there with other
            content is not replaced: it may have been filled in.
        seed: chooses which response is on the left; None: the first one.

    Raises:
        ActiveDPOError: a bad line in the batch, one that is labeled already, a text that no tool
            can keep, or an output that cannot be written or is the batch.
    """
    chosen = _tool(tool)
    target = Path(output)
    (check_file_target if chosen.suffix else check_folder_target)(target)
    if not target.name.lower().endswith(chosen.suffix):
        raise ActiveDPOError(f"{target}: the output of {tool} is one {chosen.suffix} file")
    rows = _read_batch(Path(batch))
    files = chosen.export(show_picks([(place, pick) for place, pick, _ in rows], seed))
    contents = {target / name if name else target: content for name, content in files.items()}
    for file in contents:
        _check_not_read(file, batch)
        _check_replaces_nothing(file, contents[file])
    for file, content in contents.items():
        write_atomic(file, content)
    return len(rows)


def import_answers(
    batch: FilePath,
    answers: FilePath,
    tool: str,
    output: FilePath,
    *,
    set_aside: FilePath | None = None,
    labeler: str = "unknown",
    combine: str | None = None,
) -> Imported:
    """Write the labels that came back from a tool.

    The file of labels has a line for every pick of the batch, in its order, with all fields of the
    pick and `label`: 0 or 1, the position in `responses`, "tie" or "skip", or null if there is no
    answer; and `labeler`, and `seconds`, `comment` and `strength` where the tool has them. All
    readers of labels read it.

    Args:
        batch: the file of picks that was exported, unchanged.
        answers: what the tool exported: a file, or a folder for potato.
        tool: a name in `TOOLS`.
        output: the file of labels. If several labelers answered, there is one file for each:
            `labels.jsonl` becomes `labels-<labeler>.jsonl`.
        set_aside: a JSONL file for answers that cannot be used; without it they are an error.
        labeler: the labeler's name where the tool has none.
        combine: "majority" or "dawid-skene": all answers to a pair become one label in one file, as
            in `labels.combine`, with its `weight` and the `answers`.

    Raises:
        ActiveDPOError: an answer that cannot be used (see `matching.match`) and no `set_aside`; no
            answer at all; a file that cannot be read or written; an output that is the batch or
            the answers.
    """
    chosen = _tool(tool)
    for target in (output, set_aside):
        check_file_target(target)
        if target is not None:
            _check_not_read(target, batch, answers)
    rows = _read_batch(Path(batch))
    picks = [pick for _, pick, _ in rows]
    labels, problems = match(chosen.answers(Path(answers), labeler), picks)
    if problems and set_aside is None:
        raise ActiveDPOError(_refusal(problems))
    if not labels:
        raise ActiveDPOError(f"{answers}: no answer to any of the {len(picks)} pairs of {batch}")
    by_labeler: dict[str, dict[int, Label]] = {}
    for label in labels:
        by_labeler.setdefault(label.answer.labeler, {})[label.position] = label
    labelers = sorted(by_labeler)
    files = dict.fromkeys(labelers, Path(output)) if combine else _files(Path(output), labelers)
    for file in files.values():
        _check_not_read(file, batch, answers)
    if set_aside is not None:
        if Path(set_aside).resolve() in {file.resolve() for file in files.values()}:
            raise ActiveDPOError(f"{set_aside} is also the file of labels: name another one")
        write_atomic(set_aside, "".join(map(_problem_line, problems)))
    combined: list[CombinedLabel] = []
    if combine:
        text, combined = _combined(rows, by_labeler, combine)
        _write_labels(Path(output), text)
    else:
        for name, file in files.items():
            mine = by_labeler[name]
            lines = (_line(row, mine.get(n), name) for n, (_, _, row) in enumerate(rows))
            _write_labels(file, "".join(lines))
    return Imported(
        files,
        {
            name: Counter(label.label for label in given.values())
            for name, given in by_labeler.items()
        },
        len(picks),
        len(picks) - len({label.position for label in labels}),
        len(problems),
        Counter(found.label for found in combined) if combine else None,
        sum(found.split for found in combined),
    )


def _check_replaces_nothing(file: Path, content: str) -> None:
    """Refuse to replace a file that may have been filled in."""
    if file.exists() and file.read_bytes() != content.encode():
        raise ActiveDPOError(
            f"{file} exists and may hold answers: choose another --output, or remove it"
        )


def _write_labels(file: Path, content: str) -> None:
    """Write labels; others that are there already are kept in a copy."""
    if file.exists() and file.read_bytes() != content.encode():
        keep_labels(file)
    write_atomic(file, content)


def _tool(name: str) -> Tool:
    if name not in TOOLS:
        raise ActiveDPOError(f"no tool {name!r}: choose one of {', '.join(TOOLS)}")
    return TOOLS[name]


def _check_not_read(target: FilePath, *inputs: FilePath) -> None:
    """Raise `ActiveDPOError` if writing to `target` would replace what is read: people's work."""
    for given in map(Path, inputs):
        read = [given, *given.rglob("*")] if given.is_dir() else [given]
        if os.path.exists(target) and any(
            file.exists() and os.path.samefile(target, file) for file in read
        ):
            raise ActiveDPOError(f"{target} is read, and would be replaced: choose another output")


def _read_batch(path: Path) -> list[tuple[str, Pick, dict[str, Any]]]:
    check_size(path)
    rows = read_picks(path)
    if not rows:
        raise ActiveDPOError(f"{path}: has no picks")
    for place, _, record in rows:
        if record.get("label") is not None:
            raise ActiveDPOError(
                f"{place}: is labeled already: give a file of picks that have no label yet"
            )
    return rows


def _refusal(problems: Sequence[Problem]) -> str:
    first = problems[0]
    more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
    return (
        f"{first.place}: {first.reason}{more}: correct it, or set such answers aside with "
        "--set-aside FILE"
    )


def _problem_line(problem: Problem) -> str:
    line = {"place": problem.place, "reason": problem.reason, "record": problem.record}
    try:
        text = json.dumps(line, default=str)  # ASCII: it may hold what no file can
    except (RecursionError, ValueError):
        text = ""
    if not text or len(text) > _LONGEST_RECORD:
        text = json.dumps({**line, "record": "left out: too long or too deeply nested"})
    return text + "\n"


def _combined(
    rows: Sequence[tuple[str, Pick, dict[str, Any]]],
    by_labeler: Mapping[str, Mapping[int, Label]],
    combine: str,
) -> tuple[str, list[CombinedLabel]]:
    """Return the lines of all picks, each with one label from all its answers, and the labels."""
    answers = [
        {name: given[n] for name, given in sorted(by_labeler.items()) if n in given}
        for n in range(len(rows))
    ]
    votes = [{name: given.label for name, given in own.items()} for own in answers]
    lines = []
    labels = COMBINERS[combine](votes)
    for (_, _, row), own, found in zip(rows, answers, labels, strict=True):
        said = {} if found is None else {"weight": round(found.weight, 6)}
        filled = {**row, "label": None if found is None else found.label, **said}
        filled["answers"] = [_answer(name, label) for name, label in own.items()]
        lines.append(json_text(filled))
    return "".join(lines), [found for found in labels if found is not None]


def _answer(labeler: str, label: Label) -> dict[str, Any]:
    optional = {name: getattr(label.answer, name) for name in _OPTIONAL}
    known = {name: value for name, value in optional.items() if value is not None}
    return {"label": label.label, "labeler": labeler, **known}


def _line(row: Mapping[str, Any], label: Label | None, labeler: str) -> str:
    filled: dict[str, Any] = {**row, "label": None}
    if label is not None:
        filled.update(_answer(labeler, label))
    return json_text(filled)


def _files(output: Path, labelers: Iterable[str]) -> dict[str, Path]:
    """Return the file of each labeler; names become file names that cannot leave the folder."""
    names = list(labelers)
    if len(names) == 1:
        return {names[0]: output}
    return {name: output.with_name(f"{output.stem}-{_slug(name)}{output.suffix}") for name in names}


def _slug(name: str) -> str:
    safe = re.sub(r"[^a-z0-9_@.-]+", "_", name.lower())[:40].strip("._-")
    if safe == name:
        return safe
    return f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")
