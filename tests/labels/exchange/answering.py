"""Fill in what was exported, as each tool gives it back."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Choices = Sequence[str]  # left, right, tie or skip for each record, in order


def fill_in(tool: str, exported: Path, choices: Choices, labeler: str = "ann") -> Path:
    """Write what `tool` gives back if `labeler` answers `choices`, and return where."""
    return _TOOLS[tool](exported, choices, labeler)


def _label_studio(exported: Path, choices: Choices, labeler: str) -> Path:
    tasks = json.loads((exported / "tasks.json").read_text())
    for n, (task, choice) in enumerate(zip(tasks, choices, strict=True)):
        result = {"from_name": "better", "value": {"selected": choice}}
        if choice in ("tie", "skip"):
            result = {"from_name": "no_preference", "value": {"choices": [choice]}}
        task["annotations"] = [{"id": n, "completed_by": {"email": labeler}, "result": [result]}]
    return _written(exported / "export.json", json.dumps(tasks))


def _argilla(exported: Path, choices: Choices, labeler: str) -> Path:
    records = [
        {
            "id": record["id"],
            **record["fields"],
            **record["metadata"],
            "better.responses": [choice],
            "better.responses.users": [labeler],
            "better.responses.status": ["submitted"],
        }
        for record, choice in zip(
            json.loads((exported / "records.json").read_text()), choices, strict=True
        )
    ]
    return _written(exported / "export.json", json.dumps(records))


def _potato(exported: Path, choices: Choices, labeler: str) -> Path:
    values = {
        "left": ("better", "selection", "A"),
        "right": ("better", "selection", "B"),
        "tie": ("better", "selection", "tie"),
        "skip": ("no_answer", "skip", "skip"),
    }
    return _potato_state(exported, [values[choice] for choice in choices], labeler)


def _potato_scale(exported: Path, choices: Choices, labeler: str) -> Path:
    values = {
        "left": ("better", "scale_value", "-2"),
        "right": ("better", "scale_value", "1"),
        "tie": ("better", "scale_value", "0"),
        "skip": ("no_answer", "skip", "skip"),
    }
    return _potato_state(exported, [values[choice] for choice in choices], labeler)


def _potato_state(exported: Path, values: Sequence[tuple[str, str, str]], labeler: str) -> Path:
    with open(exported / "picks.jsonl", encoding="utf-8") as lines:
        items = [json.loads(line) for line in lines]
    labels = {
        item["id"]: [[{"schema": schema, "name": name}, value]]
        for item, (schema, name, value) in zip(items, values, strict=True)
    }
    state = {"user_id": labeler, "instance_id_to_label_to_value": labels}
    folder = exported / "annotation_output" / "somebody"
    folder.mkdir(parents=True, exist_ok=True)
    _written(folder / "user_state.json", json.dumps(state))
    return folder.parent


def _distilabel(exported: Path, choices: Choices, labeler: str) -> Path:
    ratings: dict[str, Any] = {"left": [5, 1], "right": [1, 2.5], "tie": [3, 3], "skip": None}
    return _rows(
        exported, [{"ratings": ratings[choice], "model_name": labeler} for choice in choices]
    )


def _lmarena(exported: Path, choices: Choices, labeler: str) -> Path:
    winners = {"left": "model_a", "right": "model_b", "tie": "both_bad", "skip": None}
    return _rows(exported, [{"winner": winners[choice], "judge": labeler} for choice in choices])


def _jsonl(exported: Path, choices: Choices, labeler: str) -> Path:
    return _rows(exported, [{"choice": choice, "labeler": labeler} for choice in choices])


def _csv(exported: Path, choices: Choices, labeler: str) -> Path:
    with open(exported, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open(exported, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row, choice in zip(rows, choices, strict=True):
            writer.writerow({**row, "choice": choice, "labeler": labeler})
    return exported


def _rows(exported: Path, more: Sequence[dict[str, Any]]) -> Path:
    with open(exported, encoding="utf-8") as lines:
        rows = [{**json.loads(line), **new} for line, new in zip(lines, more, strict=True)]
    return _written(exported, "".join(json.dumps(row) + "\n" for row in rows))


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


_TOOLS = {
    "label-studio": _label_studio,
    "argilla": _argilla,
    "potato": _potato,
    "potato-scale": _potato_scale,
    "distilabel": _distilabel,
    "lmarena": _lmarena,
    "csv": _csv,
    "jsonl": _jsonl,
}
# Tools that have no skip: such an answer is none.
WITHOUT_SKIP = ("distilabel", "lmarena")
