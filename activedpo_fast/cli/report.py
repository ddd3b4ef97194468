"""The command `activedpo report`: what runs did, as tables and one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from activedpo_fast._files import check_file_target, write_atomic
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.report.card import model_card
from activedpo_fast.report.compare import pair_runs
from activedpo_fast.report.figures import check_matplotlib
from activedpo_fast.report.page import render_page, summary
from activedpo_fast.report.reading import RunData, read_runs
from activedpo_fast.report.tables import aligned, paired_table, rounds_table


def report_runs(
    folders: Sequence[Path], *, output: Path | None = None, card: Path | None = None
) -> str:
    """Write the report of runs, and the model card if wanted; return their tables.

    Raises:
        ActiveDPOError: a folder is not that of a run; a file cannot be written; a card of several
            runs, or of a run without an adapter; an output that is, or may be, a run's own file;
            matplotlib is missing.
    """
    check_matplotlib()
    if card is not None and len(folders) > 1:
        raise ActiveDPOError("--card: a model card is of one run; give one RUN")
    if output is None:
        output = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    runs = read_runs(list(folders))
    for option, path in (("--output", output), ("--card", card)):
        check_file_target(path)
        if path is not None:
            _check_no_file_of_a_run(option, path, folders)
    if card is not None and card.resolve() == output.resolve():
        raise ActiveDPOError(f"--card {card}: is also the report's file: name another one")
    texts = {output: render_page(runs)}
    written = [f"report: {output}"]
    if card is not None:
        texts[card] = model_card(runs[0])
        written.append(f"model card: {card}")
    for path, text in texts.items():
        # The name of a folder may have bytes that are no UTF-8.
        write_atomic(path, text.encode("utf-8", "backslashreplace"))
    return "\n\n".join([*map(_run_text, runs), *_comparison(runs), "   ".join(written)])


def _check_no_file_of_a_run(option: str, path: Path, folders: Sequence[Path]) -> None:
    """Raise `ActiveDPOError` if writing to `path` could replace what a run goes on from."""
    target = path.resolve()
    for folder in folders:
        run = folder.resolve()
        beside = target.parent == run and target.suffix in (".html", ".md")
        if target.is_relative_to(run) and not beside:
            raise ActiveDPOError(
                f"{option} {path}: in {folder}, only .html and .md files beside the run's own can "
                "be written: choose another"
            )


def _run_text(run: RunData) -> str:
    lines = [summary(run), aligned(rounds_table(run))]
    return "\n".join([*lines, *(f"missing: {line}" for line in run.missing)])


def _comparison(runs: Sequence[RunData]) -> list[str]:
    if len(runs) < 2:
        return []
    metrics = dict.fromkeys(name for run in runs for name in run.metrics)
    paired = [found for name in metrics if (found := pair_runs(runs, name)) is not None]
    return [f"{found.metric}\n{aligned(paired_table(found))}" for found in paired]
