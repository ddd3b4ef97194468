"""The command `activedpo label`: people label the picked pairs in a local page."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from activedpo_fast._printable import shell_word
from activedpo_fast.cli.session import echo
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.files import labels_file
from activedpo_fast.labels.page.batch import Batch
from activedpo_fast.labels.page.labeling import Labeling, is_begun
from activedpo_fast.labels.page.report import report
from activedpo_fast.labels.page.server import serve
from activedpo_fast.labels.page.session import QUESTION, Session


def label_picks(
    picks_path: Path,
    *,
    output: Path | None = None,
    labeler: str = "labeler",
    overlap: float | None = None,
    seed: int | None = None,
    combine: str = "majority",
    question: str = QUESTION,
    port: int = 0,
    open_browser: bool = False,
    quiet: bool = False,
) -> tuple[str, bool]:
    """Serve the page for one labeler until they are done, and write the labels file.

    The page is not served if nothing is left for this labeler.

    Args:
        picks_path: the file of the picked pairs.
        output: the labels file; None for `labels_file(picks_path)`.
        quiet: print only the page's address.
        others: as in `Labeling`, `Session` and `serve`.

    Returns:
        The report, and whether every pair has a label.

    Raises:
        ActiveDPOError: bad input; nothing is labeled then.
    """
    batch = Batch.read(picks_path)
    output = output or labels_file(picks_path)
    labeling = Labeling(batch, output, seed=seed, overlap=overlap, combine=combine)
    session = Session(labeling, labeler, question)
    left = session.progress().left

    def announce(address: str) -> None:
        echo(
            address
            if quiet
            else f"{left} pairs for {labeler}: open {address}\n"
            "in a browser on this machine. Every answer is saved at once; Ctrl-C ends, and the "
            "same command goes on.",
            lines=True,
        )
        if open_browser:
            webbrowser.open(address)

    if left:
        serve(session, port=port, ready=announce)
    else:
        labeling.write_labels()
    complete = all(label is not None for label in labeling.labels())
    where = output if is_begun(output) else f"none yet; they will be in {output}"
    return f"{report(labeling)}\nlabels: {where}", complete


def report_of(picks_path: Path, *, output: Path | None = None, combine: str = "majority") -> str:
    """Return the report of what has been labeled so far.

    Raises:
        ActiveDPOError: bad input, or nothing has been labeled.
    """
    batch = Batch.read(picks_path)
    output = output or labels_file(picks_path)
    if not is_begun(output):
        raise ActiveDPOError(
            f"{output}: nothing has been labeled yet with "
            f"`activedpo label {shell_word(picks_path)}`"
        )
    return report(Labeling(batch, output, combine=combine))
