"""Labels from people, through a JSONL file that they fill in."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from activedpo_fast._files import FilePath, write_atomic
from activedpo_fast._printable import shell_word
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.reading import SKIP, read_label
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.texts import canonical_json
from activedpo_fast.selection.picks_jsonl import Pick, pick_line, read_picks
from activedpo_fast.selection.result import Selection

if TYPE_CHECKING:
    import datasets


class LabelsPending(ActiveDPOError):
    """Labels are awaited; the message says which file to fill in."""


def labels_file(to_label: FilePath) -> Path:
    """Return where the labels of a file of picks are expected: `labels-NAME.jsonl`, next to it.

    NAME is the name of the file, without a leading "to_label-".
    """
    path = Path(to_label)
    return path.with_name(f"labels-{path.name.removeprefix('to_label-')}")


class FileOracle:
    """Write a selection for people to label, and read the labels when they are done.

    `label` writes the picks, best first, one JSON object per line with `"label": null`, and raises
    `LabelsPending`. People replace each null with 0 or 1, the position in `responses` of the better
    one, or with "skip" (or "tie") for no preference; null means "not labeled yet". To continue,
    call `label` with the same selection again (rerun the loop). Existing files are never
    overwritten.

    Args:
        path: a folder, or a file that ends in `.jsonl`. A folder serves any number of selections:
            the file is `to_label-<digest>.jsonl`, with the selection's digest. A file serves one
            selection. Labels are also accepted in `labels_file` of that file, which
            `activedpo label` writes; of two labels of a pick, that one counts.
        via: how people label, for the message: in "files", or in the "page" of `activedpo label`.

    Raises:
        LabelsPending: from `label`, while a label is missing.
        ActiveDPOError: from `label`: broken JSON, a changed text, a bad label, or a line that is
            not of this selection (the message names the line); a pick that has no line.

    Examples:
        >>> from activedpo_fast.labels import FileOracle, LabelsPending
        >>> oracle = FileOracle("round-1.jsonl")
        >>> try:
        ...     labels = oracle.label(picked)
        ... except LabelsPending as pending:
        ...     print(pending)
        4 of 4 pairs have no label yet: in round-1.jsonl set each "label" to 0 or 1 (the better of
        "responses") or "skip", then run again
    """

    def __init__(self, path: FilePath, *, via: Literal["files", "page"] = "files") -> None:
        self._path = Path(path)
        self._via = via

    def label(
        self, selection: Selection, pool: PreferencePool | datasets.Dataset | None = None
    ) -> list[int | None]:
        if not selection:
            return []
        to_label, labels = self.paths(selection)
        sources = [path for path in (labels, to_label) if path.exists()]
        if not sources:
            write_atomic(to_label, "".join(pick_line(pick, label=None) for pick in selection))
            raise LabelsPending(self._what_to_do(len(selection), selection, to_label))
        found: list[Any] = [None] * len(selection)
        for source in sources:
            if None in found:
                said = _read(source, selection)
                found = [s if f is None else f for f, s in zip(found, said, strict=True)]
        missing = sum(value is None for value in found)
        if missing:
            raise LabelsPending(self._what_to_do(missing, selection, sources[0]))
        return [None if value == SKIP else int(value) for value in found]

    def paths(self, selection: Selection) -> tuple[Path, Path]:
        """Return the file that the picks are written to, and the file checked first for labels."""
        if self._path.suffix == ".jsonl":
            return self._path, labels_file(self._path)
        lines = "".join(pick_line(pick, template=False, label=None) for pick in selection)
        digest = hashlib.sha256(lines.encode()).hexdigest()[:12]
        to_label = self._path / f"to_label-{digest}.jsonl"
        return to_label, labels_file(to_label)

    def _what_to_do(self, missing: int, selection: Selection, path: Path) -> str:
        if self._via == "page":
            todo = f"label them with `activedpo label {shell_word(self.paths(selection)[0])}`"
        else:
            todo = f'in {path} set each "label" to 0 or 1 (the better of "responses") or "{SKIP}"'
        return f"{missing} of {len(selection)} pairs have no label yet: {todo}, then run again"


def _read(path: Path, selection: Selection) -> list[Any]:
    """Return one value per pick: 0, 1, "skip", or None if not labeled yet."""
    # The key has the texts, too: a selection of several rounds may repeat an id and pair.
    position = {_key(pick): n for n, pick in enumerate(selection)}
    named = {(pick.id, pick.pair) for pick in selection}
    values: dict[int, Any] = {}
    for place, pick, record in read_picks(path):
        n = position.get(_key(pick))
        if n is None and (pick.id, pick.pair) in named:
            raise ActiveDPOError(
                f"{place}: the texts of id {pick.id!r} are not those that were picked"
            )
        if n is None:
            raise ActiveDPOError(
                f"{place}: pair {list(pick.pair)} of id {pick.id!r} is not one of "
                "the picks to label"
            )
        values[n] = read_label(record, place)
    for n, pick in enumerate(selection):
        if n not in values:
            raise ActiveDPOError(f"{path}: no line for pair {list(pick.pair)} of id {pick.id!r}")
    return [values[n] for n in range(len(selection))]


def _key(pick: Pick) -> bytes:
    return canonical_json([pick.id, pick.pair, pick.prompt, pick.responses])
