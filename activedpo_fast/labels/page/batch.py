"""The pairs to label, as a file of picks has them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from activedpo_fast._files import FilePath
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.combine import TIE, Label
from activedpo_fast.labels.reading import read_label
from activedpo_fast.pool.images import image_bytes
from activedpo_fast.pool.messages import images_of
from activedpo_fast.pool.texts import canonical_json, check_texts
from activedpo_fast.selection.picks_jsonl import Pick, read_picks


@dataclass(frozen=True)
class Batch:
    """The picks of a file, in its order.

    Attributes:
        path: the file.
        picks: what is to be labeled.
        labels: for each pick the label that the file already has, or None. Such picks are not
            asked.
    """

    path: Path
    picks: tuple[Pick, ...]
    labels: tuple[Label | None, ...]

    @classmethod
    def read(cls, path: FilePath) -> Batch:
        """Read a file of picks.

        Raises:
            ActiveDPOError: as `Selection.from_jsonl`; a text that no pool could have; an image that
                is missing; a bad label; no line.
        """
        lines = read_picks(path)
        if not lines:
            raise ActiveDPOError(f"{path}: no pairs to label")
        for place, pick, _ in lines:
            check_texts(pick.prompt, pick.responses, place)
            for image in images_of(pick.prompt):
                image_bytes(image, place)
        labels = [
            TIE if record.get("label") == TIE else read_label(record, place)
            for place, _, record in lines
        ]
        return cls(Path(path), tuple(pick for _, pick, _ in lines), tuple(labels))

    def digest(self) -> str:
        """Return a hash of the pairs and their order, which the numbers in a journal rely on."""
        pairs = [[pick.id, pick.pair, pick.prompt, pick.responses] for pick in self.picks]
        return hashlib.sha256(canonical_json(pairs)).hexdigest()
