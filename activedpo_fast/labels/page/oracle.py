"""Labels from a person at this machine: the page opens when labels are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from activedpo_fast.labels.files import FileOracle, LabelsPending
from activedpo_fast.labels.page.batch import Batch
from activedpo_fast.labels.page.labeling import Labeling
from activedpo_fast.labels.page.server import serve
from activedpo_fast.labels.page.session import QUESTION, Session
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.result import Selection

if TYPE_CHECKING:
    import datasets


class PageOracle:
    """Serve a selection in the labeling page, and return the labels when the person is done.

    The files are those of `FileOracle` and of `activedpo label`: answers that were given before the
    process ended are kept.

    Args:
        folder: where the files are.
        ready: called with the page's address.
        question: what the page asks.
        labeler: the name in the answers.
        port: on 127.0.0.1; 0 for any free one.

    Raises:
        LabelsPending: from `label`, if the person ends before all pairs are labeled.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ready: Callable[[str], None],
        question: str = QUESTION,
        labeler: str = "labeler",
        port: int = 0,
    ) -> None:
        self._files = FileOracle(folder, via="page")
        self._ready = ready
        self._question = question
        self._labeler = labeler
        self._port = port

    def label(
        self, selection: Selection, pool: PreferencePool | datasets.Dataset | None = None
    ) -> list[int | None]:
        try:
            return self._files.label(selection, pool)
        except LabelsPending:
            to_label, labels = self._files.paths(selection)
            session = Session(Labeling(Batch.read(to_label), labels), self._labeler, self._question)
            serve(session, port=self._port, ready=self._ready)
        return self._files.label(selection, pool)
