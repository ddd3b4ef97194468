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
    short,
)
from activedpo_fast.labels.exchange.reading import read_json_list
from activedpo_fast.labels.exchange.shown import ShownPick, json_text

_CONTROLS = ("better", "no_preference", "comment")
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
            values = {name: task.get(name) for name in _CONTROLS}
            where = f"{place}, annotation {short(task['annotation_id'])}"
            yield _answer(values, task, task, where, labeler, task)


def _of_task(task: Mapping[str, Any], place: str, labeler: str) -> Found:
    data, annotations = task.get("data"), task["annotations"]
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise ActiveDPOError(f"{place}: 'data' must be an object and 'annotations' a list")
    for n, annotation in enumerate(annotations, start=1):
        if not isinstance(annotation, dict):
            raise ActiveDPOError(f"{place}: annotation {n} is not an object")
        results = annotation.get("result") or []
        values = {name: _of_control(results, name) for name in _CONTROLS}
        meta = {
            "annotator": annotation.get("completed_by"),
            "lead_time": annotation.get("lead_time"),
            "cancelled": annotation.get("was_cancelled") or annotation.get("skipped"),
        }
        where = f"{place}, annotation {short(annotation.get('id', n))}"
        yield _answer(values, data, meta, where, labeler, {"data": data, "annotation": annotation})


def _answer(
    values: Mapping[Any, Any],
    data: Mapping[str, Any],
    meta: Mapping[str, Any],
    place: str,
    labeler: str,
    record: Any,
) -> Answer | Problem:
    chosen = [*_texts(values["better"], "selected"), *_texts(values["no_preference"], "choices")]
    if meta.get("cancelled"):  # Label Studio's own button "Skip", whatever was filled in
        chosen = ["skip"]
    if not chosen:
        return Problem(place, "the annotation has no answer", record)
    if len(chosen) > 1:
        several = " and ".join(map(short, chosen[:3]))
        return Problem(place, f"the annotation has several answers: {several}", record)
    who = meta.get("annotator")
    if isinstance(who, dict):
        who = who.get("email") or who.get("id")
    return Answer(
        place=place,
        record_id=str(data.get(_ID)),
        choice=chosen[0],
        labeler=as_labeler(who, labeler),
        record=record,
        prompt=str(data.get("prompt")),
        left=str(data.get("left")),
        right=str(data.get("right")),
        identity=data,
        seconds=as_seconds(meta.get("lead_time")),
        comment=as_text("\n".join(_texts(values["comment"], "text"))),
    )


def _of_control(results: Any, name: str) -> list[Any]:
    """Return the values that an annotation has for a control."""
    if not isinstance(results, list):
        return []
    mine = [r for r in results if isinstance(r, dict) and r.get("from_name") == name]
    return [result.get("value") for result in mine]


def _texts(value: Any, key: str) -> list[str]:
    """Return the texts in a result: "x", {key: "x"}, {key: ["x"]}, or a list of these."""
    found = []
    for one in value if isinstance(value, list) else [value]:
        inner = one.get(key) if isinstance(one, dict) else one
        found += [text for text in (inner if isinstance(inner, list) else [inner])]
    return [text for text in found if isinstance(text, str)]
