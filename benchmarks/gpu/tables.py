"""Tables of `benchmarks.gpu`: a short one for the end of a run, and those of the documentation.

    python -m benchmarks.gpu.tables             print the tables of benchmarks/results/gpu_*.json
    python -m benchmarks.gpu.tables --write     put them into the documents

Places in the documents are marked as `benchmarks.markdown` says. A table says so if no GPU has run
it yet; a dry run is never shown as a result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.markdown import optional, table, write_into

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BEFORE = RESULTS / "gpu_before"  # runs of earlier kernels, for comparison
HOST_TIME = RESULTS / "host_time.json"
DOCUMENTS = (ROOT / "docs" / "gpu.md", ROOT / "README.md")
NONE = "not yet run on a GPU"

Result = dict[str, Any]
Row = dict[str, Any]


def summary(result: Result) -> str:
    """The summary at the end of a run: at most 60 lines, failures and aims before figures."""
    head = [f"{result['device']['name']}: {_verdict(result)}"]
    if result["dry_run"]:
        head.append("a dry run: nothing here is a result")
    for name, section in result["sections"].items():
        counts = _counts(section["cases"].values())
        head.append(f"{name:<11}{section.get('seconds', 0):6.0f} s  {counts}")
    bad = [
        f"  {record['status']} {name}: {_reason(record)}"[:160]
        for section in result["sections"].values()
        for name, record in section["cases"].items()
        if record["status"] != "ok"
    ]
    return "\n".join(
        [
            *head,
            *_at_most(bad, 16),
            *_at_most(_aim_lines(result), 14),
            *_at_most(_figures(result), 20),
        ]
    )


def load(results: Path = RESULTS, pattern: str = "gpu_*.json") -> list[Result]:
    """The committed runs, by file name, without dry runs."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob(pattern))]
    return [run for run in runs if not run["dry_run"]]


def tables(runs: list[Result], before: Sequence[Result] = ()) -> dict[str, str]:
    """Markdown by table name, one block a run in each. before: runs of earlier kernels."""
    makers: dict[str, Callable[[Result], str]] = {
        "gpu machine": _machine,
        "gpu aims": _aims,
        "gpu tests": _tests,
        "gpu sanitizer": _sanitizer,
        "gpu micro": _micro,
        "gpu selection": _selection,
        "gpu end to end": _end_to_end,
        "gpu profiles": _profiles,
        "gpu before": partial(_changed, before),
    }
    host = {"gpu host time": _host_time()}
    if not runs:
        none = {name: table([{}], {name.removeprefix("gpu "): lambda r: NONE}) for name in makers}
        return none | host
    return host | {name: "\n\n".join(maker(run) for run in runs) for name, maker in makers.items()}


def _host_time() -> str:
    """The runs of `host_time`, which need no GPU, by commit."""
    rows = [
        {"sketch": f"{sketch}, {run['commit']}", **figures}
        for run in json.loads(HOST_TIME.read_text())["runs"]
        for sketch, figures in run["figures"].items()
    ]
    columns: dict[str, Callable[[Row], str]] = {"sketch, commit": lambda r: r["sketch"]}
    for title, key in (
        ("µs a forward hook", "forward_hook_us"),
        ("µs a backward hook", "backward_hook_us"),
        ("µs a weight of a launch", "weight_of_a_launch_us"),
        ("ms a batch", "batch_ms"),
    ):
        columns[title] = lambda r, key=key: f"{r[key]:.1f}"  # type: ignore[misc]
    return table(rows, columns | {"launches a batch": lambda r: str(r["launches"])})


def _machine(run: Result) -> str:
    device = run["device"]
    versions = ", ".join(
        f"{name} {version or '(none)'}" for name, version in run["versions"].items()
    )
    return (
        f"{device['name']}, capability {device['capability']}, {device['multiprocessors']} "
        f"multiprocessors, {device['l2_mib']:.0f} MiB of L2, driver {device['driver']}; "
        f"{run['cores']} cores; {versions}. {_measured(run)}{_changes(run)}."
    )


def _measured(run: Result) -> str:
    """The date and the code that each section was measured with."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, section in run["sections"].items():
        at = section.get("date", run["date"]), (section.get("commit") or "unknown")[:10]
        names.setdefault(at, []).append(name)
    return "; ".join(
        f"{', '.join(sections)}: {date}, commit {commit}"
        for (date, commit), sections in names.items()
    )


def _changes(run: Result) -> str:
    return " with changes" if run["dirty"] else ""


def _changed(before: Sequence[Result], run: Result) -> str:
    """The aims as found by earlier kernels and now, on the same device."""
    now = {aim["aim"]: aim["value"] for aim in run["aims"]}
    rows = [
        {**aim, "now": now[aim["aim"]], "commit": (earlier["commit"] or "unknown")[:10]}
        for earlier in before
        if earlier["device"]["name"] == run["device"]["name"]
        for aim in earlier["aims"]
        if aim["value"] is not None and now.get(aim["aim"]) is not None
    ]
    return table(
        rows,
        {
            f"{run['device']['name']}": lambda r: r["aim"],
            "earlier commit": lambda r: r["commit"],
            "then": lambda r: _number(r["value"]),
            "now": lambda r: _number(r["now"]),
        },
    )


def _profiles(run: Result) -> str:
    """The time of a model: the GPU's work, and its waits."""
    rows = [
        {"model": name, "way": way, **profile}
        for name, record in _cases(run, "end_to_end")
        if record["status"] == "ok"
        for way, profile in record["profiles"].items()
        if profile and "launches" in profile
    ]
    return table(
        rows,
        {
            f"under the profiler, {run['device']['name']}": lambda r: f"{r['model']}: {r['way']}",
            "launches": lambda r: f"{r['launches']:,}",
            "GPU busy, s": lambda r: f"{r['busy_seconds']:.3f}",
            "from first to last, s": lambda r: f"{r['span_seconds']:.3f}",
            "sketch kernels, s": lambda r: _kernel_seconds(r, "lora_grad_sketch"),
            "their launches": lambda r: _kernel_count(r, "lora_grad_sketch"),
        },
    )


def _kernel_seconds(profile: Row, name: str) -> str:
    found = [k["seconds"] for k in profile["kernels"] if name in k["name"]]
    return f"{sum(found):.3f}" if found else "–"


def _kernel_count(profile: Row, name: str) -> str:
    return str(sum(k["count"] for k in profile["kernels"] if name in k["name"]) or "–")


def _aims(run: Result) -> str:
    return table(
        run["aims"],
        {
            f"aim, {run['device']['name']}": lambda r: r["aim"],
            "wanted": lambda r: ("≤ " if r["at_most"] else "≥ ") + _number(r["limit"]),
            "found": lambda r: _number(r["value"]),
            "met": lambda r: {True: "yes", False: "no", None: "not measured"}[r["met"]],
        },
    )


def _tests(run: Result) -> str:
    rows = [{"file": name, **record} for name, record in _cases(run, "tests")]
    if not rows:
        return f"{run['device']['name']}: not run."
    outcomes = ("passed", "failed", "skipped")
    return table(
        rows,
        {
            f"tests marked gpu, {run['device']['name']}": lambda r: r["file"],
            **{o: lambda r, o=o: str(r.get("counts", {}).get(o, 0)) for o in outcomes},
            "note": _note_of_tests,
        },
    )


def _sanitizer(run: Result) -> str:
    rows = [{"case": name, **record} for name, record in _cases(run, "sanitizer")]
    if not rows:
        return f"compute-sanitizer, {run['device']['name']}: not run."
    return table(
        rows,
        {
            f"compute-sanitizer, {run['device']['name']}": lambda r: r["case"],
            "tests passed": lambda r: str(r.get("counts", {}).get("passed", 0)),
            "failed": lambda r: str(r.get("counts", {}).get("failed", 0)),
            "errors found": lambda r: "–" if r.get("errors") is None else str(r["errors"]),
            "note": _note_of_tests,
        },
    )


def _note_of_tests(record: Row) -> str:
    return record.get("complaint", "").split("\n")[0] if record["status"] == "ok" else _note(record)


def _micro(run: Result) -> str:
    cases = dict(_cases(run, "micro"))
    measured = [r for r in cases.values() if r["status"] == "ok" and "group" in r]
    rest = [{"case": name, **r} for name, r in cases.items() if r["status"] != "ok"]
    parts = [_ceilings(cases)]
    for group in dict.fromkeys(r["group"] for r in measured):
        rows = [r for r in measured if r["group"] == group]
        shapes = list(dict.fromkeys(r["shape"] for r in rows))
        rows.sort(key=lambda r: shapes.index(r["shape"]))
        columns: dict[str, Any] = {
            f"{group}, {run['device']['name']}": lambda r: f"{r['shape']}: {r['contender']}",
            "µs": lambda r: _micros(r["seconds"]),
            "floor, µs": lambda r: _micros(r["floor_seconds"]),
            "× floor": lambda r: f"{r['times_floor']:.2f}",
            "launch, µs": lambda r: _micros(r["host_seconds"]),
            "error": lambda r: "–" if r["error"] is None else f"{r['error']:.1e}",
        }
        if any("useful_share" in r for r in rows):
            columns |= {
                "of bf16 rate": lambda r: _share(r.get("useful_share")),
                "as carried out": lambda r: _share(r.get("executed_share")),
            }
        parts.append(table(rows, columns))
    if rest:
        parts.append(table(rest, {"not measured": lambda r: r["case"], "why": _note}))
    return "\n\n".join(parts)


def _ceilings(cases: dict[str, Row]) -> str:
    found = []
    for record in cases.values():
        if "bytes_a_second" in record:
            found.append(
                f"copy on the device: {record['bytes_a_second'] / 1e12:.2f} TB/s, read "
                "and written together"
            )
        if "flops_a_second" in record:
            found.append(
                f"bf16 product of {record['size']}³: {record['flops_a_second'] / 1e12:.0f} TFLOP/s"
            )
    return "Measured ceilings: " + ("; ".join(found) or "none") + "."


def _selection(run: Result) -> str:
    rows = [{"case": name, **r} for name, r in _cases(run, "selection")]
    if not rows:
        return f"{run['device']['name']}: not run."
    return table(
        rows,
        {
            f"selection, {run['device']['name']}": lambda r: r["case"],
            "N": lambda r: optional(r, "pairs", "{:,}"),
            "k": lambda r: optional(r, "k", "{}"),
            "B": lambda r: optional(r, "picks", "{}"),
            "seconds": lambda r: optional(r, "seconds", "{:.3f}"),
            "before the launch": lambda r: optional(r.get("phases", {}), "before", "{:.3f}"),
            "in the kernel": lambda r: optional(r.get("phases", {}), "kernel", "{:.3f}"),
            "rows a pick": lambda r: optional(r, "rows_a_pick", "{:.0f}"),
            "first picks as ours": lambda r: optional(r, "same_first_picks", "{}"),
            "in common": lambda r: optional(r, "picks_in_common", "{}"),
            "note": lambda r: "" if r["status"] == "ok" else _note(r),
        },
    )


def _end_to_end(run: Result) -> str:
    parts = []
    for name, record in _cases(run, "end_to_end"):
        if record["status"] != "ok":
            parts.append(f"{name}: {_note(record)}.")
            continue
        rows = [{"way": way, **values} for way, values in record["ways"].items()]
        about = (
            f"{name}: {record['trainable'] / 1e6:.1f} M trainable numbers, weights "
            f"{record['weights_gib']:.1f} GiB; {record['pairs']} pairs, sequences of "
            f"{record['sequence_tokens']:.0f} tokens, responses of "
            f"{record['response_tokens']:.0f} (means), {record['batch_tokens']:,} tokens a "
            "batch."
        )
        parts.append(
            about
            + "\n\n"
            + table(
                rows,
                {
                    f"gradient rows, {run['device']['name']}": lambda r: r["way"],
                    "pairs a second": lambda r: f"{r['pairs_a_second']:.1f}",
                    "seconds": lambda r: f"{r['seconds']:.3f}",
                    "× floor": lambda r: f"{r['times_floor']:.3f}",
                    "over it, of the backward pass": lambda r: _share(
                        r.get("overhead_of_backward")
                    ),
                    "peak GiB": lambda r: optional(r, "peak_gib", "{:.1f}"),
                },
            )
        )
    return "\n\n".join(parts) or f"{run['device']['name']}: not run."


def _cases(run: Result, section: str) -> Iterable[tuple[str, Row]]:
    return run["sections"].get(section, {}).get("cases", {}).items()


def _verdict(result: Result) -> str:
    met = [aim["met"] for aim in result["aims"]]
    return f"{met.count(True)} aims met, {met.count(False)} missed, {met.count(None)} not measured"


def _aim_lines(result: Result) -> list[str]:
    marks = {True: "met   ", False: "MISSED", None: "–     "}
    return [
        f"  {marks[a['met']]} {a['aim']}: {_number(a['value'])} "
        f"({'at most' if a['at_most'] else 'at least'} {_number(a['limit'])})"
        for a in result["aims"]
    ]


def _figures(result: Result) -> list[str]:
    """The slowest of ours over its floor, and whole models."""
    ours = [r for _, r in _cases(result, "micro") if r.get("ours") and r["status"] == "ok"]
    lines = [
        f"  {r['group']}, {r['shape']}: {_micros(r['seconds'])} µs, {r['times_floor']:.2f} x floor"
        for r in sorted(ours, key=lambda r: -r["times_floor"])
    ][:10]
    for name, record in _cases(result, "end_to_end"):
        if record["status"] == "ok":
            ways = ", ".join(f"{way} {v['times_floor']:.3f}" for way, v in record["ways"].items())
            lines.append(f"  {name}, x floor: {ways}"[:160])
    for name, record in _cases(result, "selection"):
        if record["status"] == "ok":
            lines.append(f"  selection, {name}: {record['seconds']:.3f} s")
    return lines


def _counts(records: Iterable[Row]) -> str:
    statuses = [record["status"] for record in records]
    return (
        ", ".join(f"{statuses.count(s)} {s}" for s in ("ok", "skipped", "failed") if s in statuses)
        or "nothing"
    )


def _reason(record: Row) -> str:
    """The last line of the error."""
    lines = (record.get("reason") or record.get("traceback") or "").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _note(record: Row) -> str:
    return f"{record['status']}: {_reason(record)}".replace("|", "/")


def _at_most(lines: list[str], count: int) -> list[str]:
    return (
        lines
        if len(lines) <= count
        else [*lines[: count - 1], f"  … and {len(lines) - count + 1} more"]
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def main(
    results: Annotated[Path, typer.Option(help="the folder of runs' JSON")] = RESULTS,
    write: Annotated[
        bool, typer.Option(help="put the tables into docs/gpu.md and README.md")
    ] = False,
) -> None:
    """Print the tables of runs on GPUs, or write them into the documentation."""
    found = tables(load(results), load(BEFORE, "*.json"))
    if not write:
        print("\n\n".join(found.values()))
        return
    for document in DOCUMENTS:
        document.write_text(write_into(document.read_text(), found))
        print(f"written: {document}")


if __name__ == "__main__":
    typer.run(main)
