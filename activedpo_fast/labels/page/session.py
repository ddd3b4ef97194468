"""One labeler's way through a batch: which pair is next, on which sides, and what they answer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.combine import TIE, Label
from activedpo_fast.labels.page.answers import Answer, now, shown_entry, undo_entry
from activedpo_fast.labels.page.labeling import Labeling
from activedpo_fast.labels.reading import SKIP
from activedpo_fast.pool.texts import canonical_json

Choice = Literal["left", "right", "tie", "skip"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "skip")
QUESTION = "Which response is better?"

_SHOWN_FOR = timedelta(minutes=15)  # after that others get the pair, too
_RECENT = 20  # answers that the pace is taken from


class AlreadyAnswered(ActiveDPOError):
    """This labeler has answered the pair, in another tab for example."""


class Progress(NamedTuple):
    """How far a labeler is.

    Attributes:
        done, left: pairs that this labeler has answered, and that are left for them.
        seconds: mean seconds of their latest answers; None before the first.
    """

    done: int
    left: int
    seconds: float | None


class Session:
    """A labeler at work. Several sessions, also of other processes, may share a labeling.

    The pairs come in the order of the batch, best first. `labeling.overlap` percent of them go to
    every labeler; each of the others goes to one labeler, whoever is first. A pair that somebody
    else looks at comes last.

    Args:
        labeling: the state on disk.
        labeler: a name, which is in every answer.
        question: what the page asks.

    Raises:
        ActiveDPOError: a name that is empty, too long or has control characters.
    """

    def __init__(self, labeling: Labeling, labeler: str, question: str = QUESTION) -> None:
        if not labeler.strip() or not labeler.isprintable() or len(labeler) > 64:
            raise ActiveDPOError(
                f"--labeler {labeler!r}: a name has 1 to 64 characters, without control characters"
            )
        self.labeling = labeling
        self.labeler = labeler
        self.question = question
        batch, answers = labeling.batch, labeling.answers
        self._batch, self._answers = batch, answers
        by_hash = sorted(range(len(batch.picks)), key=lambda pair: self._hash("shared", pair))
        self._shared = set(by_hash[: math.ceil(len(by_hash) * labeling.overlap / 100)])

    def current(self) -> int | None:
        """Return the number of the pair to show now; None if nothing is left."""
        with self.labeling.locked():
            return self._show_next()

    def left(self, pair: int) -> int:
        """Return which response of a pair this labeler sees on the left: 0 or 1."""
        return self._hash("sides", self.labeler, pair)[0] % 2

    def answer(
        self,
        pair: int,
        choice: Choice,
        *,
        seconds: float,
        strength: int | None = None,
        comment: str = "",
    ) -> int | None:
        """Save an answer; return the pair to show next.

        Raises:
            AlreadyAnswered: this labeler has answered the pair.
            ActiveDPOError: the answer could not be saved.
        """
        left = self.left(pair)
        labels: dict[Choice, Label] = {"left": left, "right": 1 - left, "tie": TIE, "skip": SKIP}
        with self.labeling.locked():
            if self._answers.of(self.labeler, pair) is not None or self._is_given(pair):
                raise AlreadyAnswered("this pair is already answered, in another tab perhaps")
            self.labeling.append(
                Answer(
                    pair=pair,
                    labeler=self.labeler,
                    label=labels[choice],
                    left=left,
                    seconds=round(seconds, 3),
                    time=now().isoformat(),
                    strength=strength if choice in ("left", "right") else None,
                    comment=comment.strip(),
                ).entry()
            )
            following = self._next()
            with suppress(ActiveDPOError):  # a disk that is full now: the answer is saved
                self._note_shown(following)
            return following

    def undo(self) -> Answer | None:
        """Take back this labeler's latest answer and return it; its pair is shown again.

        None if there is no answer to take back.
        """
        with self.labeling.locked():
            given = self._answers.by(self.labeler)
            if not given:
                return None
            pair = given[-1].pair
            self.labeling.append(undo_entry(pair, self.labeler), shown_entry(pair, self.labeler))
            return given[-1]

    def progress(self) -> Progress:
        given = self._answers.by(self.labeler)
        recent = [answer.seconds for answer in given[-_RECENT:]]
        return Progress(
            done=len(given),
            left=sum(1 for _ in self._open_pairs()),
            seconds=sum(recent) / len(recent) if recent else None,
        )

    def _show_next(self) -> int | None:
        """Choose the pair to show and say so in the journal."""
        pair = self._next()
        self._note_shown(pair)
        return pair

    def _next(self) -> int | None:
        open_pairs = list(self._open_pairs())
        if not open_pairs:
            return None
        shown, _ = self._answers.shown.get(self.labeler, (None, None))
        if shown in open_pairs:
            return shown  # a page that was loaded again, or an undo
        oldest = now() - _SHOWN_FOR
        others = {
            pair
            for labeler, (pair, since) in self._answers.shown.items()
            if labeler != self.labeler and since > oldest and pair not in self._shared
        }
        return next((pair for pair in open_pairs if pair not in others), open_pairs[0])

    def _note_shown(self, pair: int | None) -> None:
        shown, _ = self._answers.shown.get(self.labeler, (None, None))
        if pair is not None and pair != shown:
            self.labeling.append(shown_entry(pair, self.labeler))

    def _open_pairs(self) -> Iterator[int]:
        for pair in range(len(self._batch.picks)):
            labelers = self._answers.labelers_of(pair)
            mine = self.labeler in labelers or (pair not in self._shared and labelers)
            if not mine and not self._is_given(pair):
                yield pair

    def _is_given(self, pair: int) -> bool:
        return self._batch.labels[pair] is not None

    def _hash(self, *what: Any) -> bytes:
        *names, pair = what
        pick = self._batch.picks[pair]
        key = [self.labeling.seed, *names, pick.id, pick.pair, pick.prompt, pick.responses]
        return hashlib.sha256(canonical_json(key)).digest()
