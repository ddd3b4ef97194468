"""Label Studio: tasks and a labeling configuration out; exports in JSON or JSON_MIN back.

Format: Label Studio 1.x; task format of labelstud.io/guide/task_format, the tag Pairwise of
labelstud.io/tags/pairwise and of the editor's source (tags/control/Pairwise.js: `selected` is left,
right or none), and JSON_MIN as `label_studio_sdk.converter` of label-studio-sdk 2.1.2 writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.exchange.answers import (
    Answer,
    Found,
    Problem,
    as_labeler,
    as_seconds,
    as_text,
)
from activedpo_fast.labels.exchange.reading import read_json_list
from activedpo_fast.labels.exchange.shown import ShownPick, json_text

_ID = "activedpo_id"  # JSON_MIN puts the task's number into `id`

# valueType: a response that is an address is shown, not fetched.
CONFIG = """\
<View>
  <Header value="Which response is better?"/>
  <Text name="prompt" value="$prompt" valueType="text"/>
  <Pairwise name="better" toName="left,right"/>
  <View style="display: grid; grid-template: auto/1fr 1fr; column-gap: 1em;">
    <View><Header value="Left"/><Text name="left" value="$left" valueType="text"/></View>
    <View><Header value="Right"/><Text name="right" value="$right" valueType="text"/></View>
  </View>
  <Choices name="no_preference" toName="prompt" choice="single" showInline="true">
    <Choice value="tie" alias="tie" hotkey="t"/>
    <Choice value="skip" alias="skip" hotkey="s"/>
  </Choices>
  <TextArea name="comment" toName="prompt" placeholder="Comment (optional)" maxSubmissions="1"/>
</View>
"""


def export(picks: Sequence[ShownPick]) -> dict[str, str]:
    """Return the files `tasks.json` and `config.xml`."""
    tasks = [
        {
            "data": {
                _ID: pick.record_id,
                "prompt": pick.prompt,
                "left": pick.left,
                "right": pick.right,
                **pick.identity(),
            }
        }
        for pick in picks
    ]
    return {"tasks.json": json_text(tasks, indent=1), "config.xml": CONFIG}


def answers(path: Path, labeler: str) -> Found:
    """Yield the answers of an export in JSON (all annotations of every task) or JSON_MIN."""
    for place, task in read_json_list(path, "task"):
        if "data" in task and "annotations" not in task:
            raise ActiveDPOError(f"{place}: no 'annotations': export the project as JSON")
        if "annotations" in task:
            yield from _of_task(task, place, labeler)
        elif task.get("annotation_id") is not None:  # None: no annotation yet
            answer = {name: task.get(name) for name in ("better", "no_preference", "comment")}
            yield _answer(
                answer, task, task, f"{place}, annotation {task['annotation_id']}", labeler
            )


def _of_task(task: Mapping[str, Any], place: str, labeler: str) -> Found:
    data, annotations = task.get("data"), task["annotations"]
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise ActiveDPOError(f"{place}: 'data' must be an object and 'annotations' a list")
    for n, annotation in enumerate(annotations, start=1):
        if not isinstance(annotation, dict):
            raise ActiveDPOError(f"{place}: annotation {n} is not an object")
        results = annotation.get("result") or []
        values = {
            result.get("from_name"): result.get("value")
            for result in results
            if isinstance(result, dict)
        }
        meta = {
            "annotator": annotation.get("completed_by"),
            "lead_time": annotation.get("lead_time"),
            "cancelled": annotation.get("was_cancelled") or annotation.get("skipped"),
        }
        where = f"{place}, annotation {annotation.get('id', n)}"
        yield _answer(values, data, meta, where, labeler, {"data": data, "annotation": annotation})


def _answer(
    values: Mapping[Any, Any],
    data: Mapping[str, Any],
    meta: Mapping[str, Any],
    place: str,
    labeler: str,
    record: Any = None,
) -> Answer | Problem:
    record = data if record is None else record
    side = _first(values.get("better"), "selected")
    other = _first(values.get("no_preference"), "choices")
    # Label Studio's own button "Skip" cancels the annotation, whatever was filled in.
    choice = "skip" if meta.get("cancelled") else side or other
    if choice is None:
        return Problem(place, "the annotation has no answer", record)
    if side and other and not meta.get("cancelled"):
        return Problem(place, f"the annotation has both {side!r} and {other!r}", record)
    who = meta.get("annotator")
    if isinstance(who, dict):
        who = who.get("email") or who.get("id")
    return Answer(
        place=place,
        record_id=str(data.get(_ID)),
        choice=choice,
        labeler=as_labeler(who, labeler),
        record=record,
        prompt=str(data.get("prompt")),
        left=str(data.get("left")),
        right=str(data.get("right")),
        identity=data,
        seconds=as_seconds(meta.get("lead_time")),
        comment=as_text(_first(values.get("comment"), "text")),
    )


def _first(value: Any, key: str) -> str | None:
    """Return the text in a result: "x", {key: "x"}, {key: ["x"]}, or a list of one of these."""
    while isinstance(value, (list, dict)):
        value = value.get(key) if isinstance(value, dict) else (value or [None])[0]
    return value if isinstance(value, str) else None
