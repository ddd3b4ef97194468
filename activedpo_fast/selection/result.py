"""The result of a selection: the pairs to label, as a file for people and a dataset for DPO."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from activedpo_fast._files import FilePath, write_atomic
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.images import image_bytes
from activedpo_fast.pool.items import PoolItem
from activedpo_fast.pool.messages import images_of, without_images
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.template import COLUMN, NOT_WITH_TOOLS, TOOLS
from activedpo_fast.selection.picks_jsonl import Pick, pick_line, read_picks

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_IMAGES = "images"  # TRL's column


@dataclass(frozen=True)
class Selection(Sequence[Pick]):
    """The picks of one call, best first, and the name of the strategy that made them.

    Examples:
        >>> from activedpo_fast import Selection
        >>> picked.to_jsonl("to_label.jsonl")
        >>> Selection.from_jsonl("to_label.jsonl", strategy="activedpo") == picked
        True
        >>> picked.to_dataset(labels)
        Dataset({
            features: ['id', 'prompt', 'chosen', 'rejected'],
            num_rows: 3
        })
    """

    picks: tuple[Pick, ...]
    strategy: str

    def __len__(self) -> int:
        return len(self.picks)

    @overload
    def __getitem__(self, index: int) -> Pick: ...
    @overload
    def __getitem__(self, index: slice) -> Selection: ...
    def __getitem__(self, index: int | slice) -> Pick | Selection:
        if isinstance(index, slice):
            return Selection(self.picks[index], self.strategy)
        return self.picks[index]

    def __iter__(self) -> Iterator[Pick]:
        return iter(self.picks)

    def to_jsonl(self, path: FilePath) -> None:
        """Write one line per pick: id, pair, score, rank, prompt, responses. The write is atomic.

        Picks that have them also get `chat_template_kwargs` and `item_chat_template_kwargs`.
        People add `"label"` to a line: 0 or 1, the position in `responses` of the response they
        prefer, or "skip" (or "tie") for no preference. A line whose label is missing or null is not
        labeled yet. `read_labels` reads the file back.

        A file with labels that is there already is kept as `NAME.labels-1` (or the next number).

        Raises:
            ActiveDPOError: a score that is not finite (JSON has no such number).
        """
        content = self.jsonl()
        keep_labels(Path(path))
        write_atomic(path, content)

    def jsonl(self) -> bytes:
        """Return what `to_jsonl` writes."""
        lines = []
        for pick in self.picks:
            if not math.isfinite(pick.score):
                raise ActiveDPOError(f"pick {pick.rank} (id {pick.id!r}): score is {pick.score}")
            lines.append(pick_line(pick))
        return "".join(lines).encode()

    @classmethod
    def from_jsonl(cls, path: FilePath, *, strategy: str = "unknown") -> Selection:
        """Read a file written by `to_jsonl`. Labels and other added columns are ignored.

        The lines do not record the strategy; pass `strategy` if it matters.

        Raises:
            ActiveDPOError: naming the first bad line (not JSON, a field missing or of the wrong
                type, the same pair twice).
        """
        return cls(tuple(pick for _, pick, _ in read_picks(path)), strategy)

    def to_dataset(self, labels: Sequence[int | None]) -> datasets.Dataset:
        """Return the labeled pairs as `trl.DPOTrainer` reads them: id, prompt, chosen, rejected.

        If picks have chat template arguments, there is also a column `chat_template_kwargs`, so
        that the trainer's tokens are the ones that were scored; if they have tools, `tools`; and if
        their prompts have images, `images`, a list for each pair.

        Args:
            labels: one per pick; 0 or 1, the position in `pick.responses` of the preferred
                response, or None for no preference: that pick is left out. (In a file, no
                preference is "skip" or "tie"; see `read_labels`.)

        Raises:
            ActiveDPOError: a wrong number of labels, any other value (including booleans), or plain
                strings and chat messages in one selection; an image whose file is missing.
        """
        import datasets  # slow to import, and needed only here

        labels = check_labels(self, labels)
        columns: dict[str, list[Any]] = {"id": [], "prompt": [], "chosen": [], "rejected": []}
        arguments: list[dict[str, Any]] = []
        images: list[list[str]] = []
        for position, (pick, preferred) in enumerate(zip(self.picks, labels, strict=True)):
            if isinstance(pick.prompt, str) != isinstance(self.picks[0].prompt, str):
                raise ActiveDPOError(
                    f"pick {position} (id {pick.id!r}): plain strings and chat messages are mixed"
                )
            if preferred is not None:
                columns["id"].append(pick.id)
                columns["prompt"].append(without_images(pick.prompt))
                columns["chosen"].append(pick.responses[preferred])
                columns["rejected"].append(pick.responses[1 - preferred])
                arguments.append(dict(pick.chat_template_kwargs or {}))
                images.append(images_of(pick.prompt))
        columns |= _argument_columns(arguments) | _image_columns(images, columns["id"])
        if TOOLS in columns and _IMAGES in columns:
            raise ActiveDPOError(NOT_WITH_TOOLS)
        features = None
        if not columns["id"]:  # nothing to infer the column types from
            string = datasets.Value("string")
            features = datasets.Features({name: string for name in columns})
        elif as_json := _json_features(columns):
            rest = {name: values for name, values in columns.items() if name not in as_json}
            types = {**datasets.Dataset.from_dict(rest).features, **as_json}
            features = datasets.Features({name: types[name] for name in columns})
        return datasets.Dataset.from_dict(columns, features=features)

    def as_pool(self) -> PreferencePool:
        """Return a pool with one two-response item per pick, in order, for history features.

        The same prompt may have been picked more than once, but ids in a pool are unique, so the
        item of pick number p has the id `"<id>#<p>"`.
        """
        items = []
        for position, pick in enumerate(self.picks):
            own = pick.item_chat_template_kwargs
            extra = {COLUMN: own} if own else {}
            items.append(PoolItem(f"{pick.id}#{position}", pick.prompt, pick.responses, extra))
        return PreferencePool(items)


def keep_labels(path: Path) -> None:
    """Copy a file that may have labels, before it is replaced."""
    # Any value except null; a file that is no JSON at all may be one that somebody is editing.
    if not path.is_file() or not re.search(rb'"label"\s*:\s*(?!null)\S', path.read_bytes()):
        return
    number = 1
    while (copy := path.with_name(f"{path.name}.labels-{number}")).exists():
        number += 1
    write_atomic(copy, path.read_bytes())
    logger.warning("%s has labels and is replaced: they are kept in %s", path, copy)


def _argument_columns(arguments: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the columns `tools` and `chat_template_kwargs`, those of them that have something."""
    listed = [isinstance(row.get(TOOLS), list) for row in arguments]
    tools = [
        row.pop(TOOLS) if is_list else None for row, is_list in zip(arguments, listed, strict=True)
    ]
    return {
        **({TOOLS: tools} if any(listed) else {}),
        **({COLUMN: arguments} if any(arguments) else {}),
    }


def _image_columns(images: list[list[str]], ids: list[str]) -> dict[str, list[Any]]:
    """Return the column `images`, if there are any."""
    if not any(images):
        return {}
    return {
        _IMAGES: [
            [_image_file(image, f"id {id!r}") for image in row]
            for id, row in zip(ids, images, strict=True)
        ]
    }


def _image_file(image: str, place: str) -> dict[str, Any]:
    """Return an image as `datasets.Image` stores it."""
    content = image_bytes(image, place)
    return {"bytes": content, "path": image if content is None else None}


def _json_features(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """Return types for the columns whose objects differ in their keys, and of images.

    In an Arrow table each object would have all keys, with null for those it lacks. A template can
    tell null from a missing key.
    """
    import datasets

    found: dict[str, Any] = {}
    for name in ("prompt", "chosen", "rejected"):
        messages = [
            message for text in columns[name] if not isinstance(text, str) for message in text
        ]
        nested = any(not isinstance(value, str) for one in messages for value in one.values())
        if nested or len({frozenset(message) for message in messages}) > 1:
            found[name] = datasets.List(datasets.Json())
    found |= {name: datasets.Json() for name in (COLUMN, TOOLS) if name in columns}
    if _IMAGES in columns:
        found[_IMAGES] = datasets.List(datasets.Image())
    return found


def check_labels(selection: Selection, labels: Sequence[Any]) -> list[int | None]:
    """Return one label per pick, 0, 1 or None; anything else, or another number, raises."""
    if len(labels) != len(selection):
        raise ActiveDPOError(f"{len(labels)} labels for {len(selection)} picks")
    return [
        check_label(label, f"label {position} (id {pick.id!r})")
        for position, (pick, label) in enumerate(zip(selection, labels, strict=True))
    ]


def check_label(label: Any, place: str) -> int | None:
    if label is None:
        return None
    # `True == 1`: a column of booleans must not pass for preferences. Integral admits NumPy's.
    if isinstance(label, Integral) and not isinstance(label, bool) and label in (0, 1):
        return int(label)
    raise ActiveDPOError(f"{place} must be 0, 1 or null (None), not {label!r}")
