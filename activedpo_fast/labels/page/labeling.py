"""A labeling: a batch, the journal of its answers, and the labels file made from both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from activedpo_fast._files import check_file_target, write_atomic
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.combine import COMBINERS, CombinedLabel
from activedpo_fast.labels.journal import Journal
from activedpo_fast.labels.page.answers import Answers, head_entry, public_fields
from activedpo_fast.labels.page.batch import Batch
from activedpo_fast.selection.picks_jsonl import pick_line


class Labeling:
    """The state on disk that all labelers of a batch share.

    Args:
        batch: the pairs.
        output: the labels file; the journal is `OUTPUT.journal.jsonl` next to it.
        seed: of the sides and of the shared pairs; None for that of the journal, 0 in a new one.
        overlap: percent of the pairs that every labeler gets; None likewise.
        combine: how several answers to a pair become one label: "majority" or "dawid-skene".

    Raises:
        ActiveDPOError: the journal is about other pairs or has other settings; `output` is a file
            that was not made from a journal, or cannot be written.
    """

    def __init__(
        self,
        batch: Batch,
        output: Path,
        *,
        seed: int | None = None,
        overlap: float | None = None,
        combine: str = "majority",
    ) -> None:
        self.batch = batch
        self.output = output
        self.answers = Answers(len(batch.picks))
        self._combine = COMBINERS[combine]
        self.journal = Journal(journal_path(output))
        check_file_target(output)
        if overlap is not None and not 0 <= overlap <= 100:  # nor NaN
            raise ActiveDPOError(f"--overlap {overlap:g}: a percentage from 0 to 100")
        if output.resolve() == batch.path.resolve():
            raise ActiveDPOError(f"{output} is the file of the pairs: choose another --output")
        if output.exists() and not is_begun(output):
            raise ActiveDPOError(
                f"{output} exists and was not written by this command "
                f"({self.journal.path.name} is missing or empty): choose another --output, or move "
                "it away"
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        with self.locked():
            # It goes to disk with the first entry: a start that fails fixes no setting.
            self._head = self.answers.head or head_entry(batch.digest(), seed or 0, overlap or 0.0)
            self._check_settings({"seed": seed, "overlap": overlap})

    @property
    def seed(self) -> int:
        return int(self._head["seed"])

    @property
    def overlap(self) -> float:
        return float(self._head["overlap"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing anything; `answers` knows all that they did before."""
        with self.journal.locked() as entries:
            for entry in entries:
                if self.answers.head is None:
                    self._check_pairs(entry)
                self.answers.apply(entry, self.journal.path)
            yield

    def append(self, *entries: dict[str, Any]) -> None:
        """Save entries, inside `locked`. They are on disk when this returns."""
        if self.answers.head is None:
            entries = (self._head, *entries)
        elif self.answers.head != self._head:
            raise ActiveDPOError(
                f"{self.journal.path}: somebody else began with other settings: run the command "
                "again"
            )
        self.journal.append(*entries)
        for entry in entries:
            self.answers.apply(entry, self.journal.path)

    def _check_pairs(self, head: dict[str, Any]) -> None:
        # Before any other entry is read: its number of a pair means nothing in another batch.
        if isinstance(head.get("pairs"), str) and head["pairs"] != self.batch.digest():
            raise ActiveDPOError(
                f"{self.journal.path} has answers to other pairs than {self.batch.path}: choose "
                "another --output"
            )

    def _check_settings(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if value is not None and value != self._head[name]:
                raise ActiveDPOError(
                    f"--{name} {value:g}: this labeling began with --{name} {self._head[name]:g}, "
                    "which all labelers share: leave the option out, or choose another --output"
                )

    def labels(self) -> list[CombinedLabel | None]:
        """Return one label per pair from the answers so far; None for those without one."""
        combined = self._combine(self.answers.votes())
        return [
            label if given is None else CombinedLabel(given, 1.0)
            for given, label in zip(self.batch.labels, combined, strict=True)
        ]

    def write_labels(self) -> None:
        """Write the labels file: a line per pair, its label, its weight and its answers.

        A pair without an answer has `"label": null`, as in every file of picks. Before anybody has
        answered, and if the batch has no labels itself, there is no labels file.
        """
        with self.locked():
            if self.answers.head is None:
                if not any(label is not None for label in self.batch.labels):
                    return
                self.append()  # the journal says whose file it is
            given: list[list[dict[str, Any]]] = [[] for _ in self.batch.picks]
            for answer in self.answers.all():
                given[answer.pair].append(public_fields(answer))
            lines = []
            for pick, label, answers in zip(self.batch.picks, self.labels(), given, strict=True):
                said: dict[str, Any] = {"label": None}
                if label is not None:
                    said = {"label": label.label, "weight": round(label.weight, 6)}
                lines.append(pick_line(pick, **said, answers=answers))
            write_atomic(self.output, "".join(lines))


def journal_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.journal.jsonl")


def is_begun(output: Path) -> bool:
    """Return whether there is anything in the journal of a labels file."""
    path = journal_path(output)
    return path.exists() and path.stat().st_size > 0
