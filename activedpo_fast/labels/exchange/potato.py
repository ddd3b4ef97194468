"""Potato: a project (configuration and items) out; its annotation output back.

Format: potato-annotation 2.12.1: the scheme `pairwise` (mode binary or scale) of
potato/server_utils/schemas/pairwise.py, and the `user_state.json` that
potato/user_state_management.py saves for every annotator below `annotation_output/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.exchange.answers import (
    Answer,
    Found,
    Problem,
    as_labeler,
    as_seconds,
    as_text,
    short,
)
from activedpo_fast.labels.exchange.reading import read_json
from activedpo_fast.labels.exchange.shown import ShownPick, json_text

_STATE = "user_state.json"
_TILES = {"A": "left", "B": "right", "tie": "tie"}
_ITEMS = "picks.jsonl"

_BINARY = {"mode": "binary", "allow_tie": True, "tie_label": "Tie"}
_SCALE = {
    "mode": "scale",
    "scale": {
        "min": -3,
        "max": 3,
        "step": 1,
        "default": 0,
        "labels": {"min": "much better", "max": "much better", "center": "Tie"},
    },
}


def export(picks: Sequence[ShownPick]) -> dict[str, str]:
    """Return the files of a project whose answers are left, right or tie."""
    return _project(picks, _BINARY)


def export_scale(picks: Sequence[ShownPick]) -> dict[str, str]:
    """Return the files of a project whose answers are on a scale from -3 (left) to 3 (right)."""
    return _project(picks, _SCALE)


def answers(path: Path, labeler: str) -> Found:
    """Yield the answers below an annotation output folder, or of one `user_state.json`."""
    files = sorted(path.glob(f"*/{_STATE}")) if path.is_dir() else [path]
    if not files:
        raise ActiveDPOError(
            f"{path}: no folder in it has a {_STATE}: give Potato's output_annotation_dir"
        )
    for file in files:
        state = read_json(file)
        items = state.get("instance_id_to_label_to_value") if isinstance(state, dict) else None
        if not isinstance(items, dict):
            raise ActiveDPOError(f"{file}: no 'instance_id_to_label_to_value', so not Potato's")
        who = as_labeler(state.get("user_id"), labeler)
        for record_id, values in items.items():
            place = f"{file}, item {short(record_id)}"
            found = _of_item(_by_name(values, place))
            if found is not None:
                yield _answer(record_id, who, found, place, state)


def _project(picks: Sequence[ShownPick], mode: Mapping[str, Any]) -> dict[str, str]:
    config = {
        "annotation_task_name": "Which response is better?",
        "task_dir": ".",
        "output_annotation_dir": "annotation_output",
        "data_files": [_ITEMS],
        "item_properties": {"id_key": "id", "text_key": "prompt"},
        "user_config": {"allow_all_users": True, "users": []},
        "require_password": False,
        "annotation_schemes": [
            {
                "annotation_type": "pairwise",
                "name": "better",
                "description": "Which response is better?",
                "items_key": "responses",
                "labels": ["Left", "Right"],
                **mode,
            },
            {
                "annotation_type": "multiselect",
                "name": "no_answer",
                "description": "No answer to this pair",
                "labels": ["skip"],
            },
            {"annotation_type": "text", "name": "comment", "description": "Comment (optional)"},
        ],
    }
    items = (
        {
            "id": pick.record_id,
            "prompt": pick.prompt,
            "responses": [pick.left, pick.right],
            **pick.identity(),
        }
        for pick in picks
    )
    return {
        "config.yaml": yaml.safe_dump(config, sort_keys=False),
        _ITEMS: "".join(json_text(item) for item in items),
    }


def _by_name(values: Any, place: str) -> dict[tuple[str, str], Any]:
    """Return {(scheme, name): value} of an item's saved labels."""
    try:
        return {(str(key["schema"]), str(key["name"])): value for key, value in values}
    except (TypeError, ValueError, KeyError) as error:
        raise ActiveDPOError(f"{place}: its labels are not in Potato's form") from error


def _of_item(values: Mapping[tuple[str, str], Any]) -> dict[str, Any] | None:
    """Return what was answered: choice, strength, comment; None if nothing was chosen."""
    skip = bool(values.get(("no_answer", "skip")))
    scale = values.get(("better", "scale_value"))
    tile = values.get(("better", "selection"))
    comments = [value for (scheme, _), value in values.items() if scheme == "comment"]
    found: dict[str, Any] = {"comment": as_text(comments[0]) if comments else None}
    if scale not in (None, ""):
        found.update(_on_scale(scale))
    elif tile not in (None, ""):
        found["choice"] = _TILES.get(tile, short(tile)) if isinstance(tile, str) else short(tile)
    elif not skip:
        return None
    if skip:  # with a side as well it is no valid choice, and is reported as such
        found["choice"] = f"{found['choice']} and skip" if "choice" in found else "skip"
    return found


def _on_scale(value: Any) -> dict[str, Any]:
    if not isinstance(value, str) or not re.fullmatch(r"-?\d{1,3}", value, re.ASCII):
        return {"choice": short(value)}
    number = int(value)
    if number == 0:
        return {"choice": "tie"}
    return {"choice": "left" if number < 0 else "right", "strength": abs(number)}


def _answer(
    record_id: str, labeler: str, found: dict[str, Any], place: str, state: Mapping[str, Any]
) -> Answer | Problem:
    record = {"id": record_id, "user_id": labeler, **found}
    order = _of_record(state, "instance_id_to_presentation_order", record_id).get("better")
    if order not in (None, [0, 1], [1, 0]):
        return Problem(place, f"the order {short(order)} of its responses is unknown", record)
    # With randomize_order, Potato shows the responses to each annotator in an order of its own.
    if order == [1, 0]:
        swapped = {"left": "right", "right": "left"}
        found["choice"] = swapped.get(found["choice"], found["choice"])
    behavior = _of_record(state, "instance_id_to_behavioral_data", record_id)
    spent = as_seconds(behavior.get("total_time_ms"))
    return Answer(
        place=place,
        record_id=record_id,
        labeler=labeler,
        record=record,
        seconds=spent / 1000 if spent else None,  # 0: not measured
        **found,
    )


def _of_record(state: Mapping[str, Any], name: str, record_id: str) -> dict[str, Any]:
    """Return what a state has about an item under a name; empty if nothing."""
    everything = state.get(name)
    found = everything.get(record_id) if isinstance(everything, dict) else None
    return found if isinstance(found, dict) else {}
