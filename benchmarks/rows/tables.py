"""Tables of `make bench`: gradient rows, their overhead, and projections."""

from __future__ import annotations

from benchmarks.markdown import Row, optional, table

GROUPS = ("rows", "overhead", "projection")


def tables(rows: list[Row]) -> dict[str, str]:
    """Markdown of one run by table name: "rows: <workload>" and "projection"."""
    found: dict[str, str] = {}
    of_group = {name: [r for r in rows if r["group"] == name] for name in GROUPS}
    for workload in dict.fromkeys(r["workload"] for r in of_group["rows"]):
        found[f"rows: {workload}"] = _workload(
            [r for r in of_group["rows"] if r["workload"] == workload]
        )
    if of_group["projection"]:
        found["projection"] = _projection(of_group["projection"])
    return found


def tables_of_runs(runs: list[tuple[str, list[Row]]]) -> dict[str, str]:
    """Markdown of several runs, each with its kind of machine: "summary", "response tokens" and
    "overhead".

    A kind has a column for each workload. Of several runs of a kind, the least and the largest
    ratio are shown.
    """
    rows = [(kind, r) for kind, run in runs for r in run if r["group"] == "rows"]
    overhead = [(kind, r) for kind, run in runs for r in run if r["group"] == "overhead"]
    names = list(dict.fromkeys(r["contender"] for _, r in rows))
    cheap = [c for c in names if "response tokens" in c or "two stages" in c]
    plain = [c for c in names if c.startswith("**ours**, sjlt") and c not in cheap]
    peers = [c for c in names if not c.startswith(("**ours**", "floor"))]
    head = "gradient rows, × one plain forward pass"
    found: dict[str, str] = {}
    if rows:
        found["summary"] = _ratios(rows, head, plain + peers, "{:.2f}")
    if cheap:
        found["response tokens"] = _ratios(rows, head, plain + cheap, "{:.2f}")
    if overhead:
        found["overhead"] = _ratios(
            [(kind, {**r, "ratio": r["ratio"] - 1}) for kind, r in overhead],
            "capture and sketch over the same passes",
            list(dict.fromkeys(r["contender"] for _, r in overhead)),
            "{:+.1%}",
        )
    return found


def _ratios(rows: list[tuple[str, Row]], head: str, contenders: list[str], form: str) -> str:
    """A line for each of `contenders`, a column for each workload and kind of machine."""
    columns = [
        (w, kind)
        for w in dict.fromkeys(r["workload"] for _, r in rows)
        for kind in dict.fromkeys(kind for kind, r in rows if r["workload"] == w)
    ]

    def cell(contender: str, workload: str, kind: str) -> str:
        ratios = [
            r["ratio"]
            for k, r in rows
            if (k, r["workload"], r["contender"]) == (kind, workload, contender)
        ]
        return (
            "–".join(dict.fromkeys(form.format(f(ratios)) for f in (min, max))) if ratios else "–"
        )

    return table(
        [{"contender": c} for c in contenders],
        {
            head: lambda r: r["contender"],
            **{
                f"{w}, {kind}": lambda r, w=w, kind=kind: cell(r["contender"], w, kind)
                for w, kind in columns
            },
        },
    )


def _workload(rows: list[Row]) -> str:
    return (
        f"{rows[0]['workload']}: {rows[0]['pool']}; k = {rows[0]['k']}. One plain forward pass: "
        f"{rows[0]['yardstick_seconds']:.2f} s.\n\n"
        + table(
            rows,
            {
                "gradient rows": lambda r: r["contender"],
                "× forward": lambda r: f"{r['ratio']:.2f}",
                "seconds": lambda r: f"{r['seconds']:.2f}",
                "peak MiB": lambda r: optional(r, "peak MiB", "{:.0f}"),
                "cosine error": lambda r: optional(r, "cosine error", "{:.4f}"),
                "norm distortion": lambda r: optional(r, "norm distortion", "{:.3f}"),
            },
        )
    )


def _projection(rows: list[Row]) -> str:
    return table(
        rows,
        {
            "8 × 1,000,000 → 4096": lambda r: r["contender"],
            "seconds": lambda r: (
                f"{r['seconds']:.4f}" if r["seconds"] < 1 else f"{r['seconds']:.1f}"
            ),
            "× floor": lambda r: f"{r['ratio']:.2f}",
            "floor": lambda r: r["floor"],
            "cosine error": lambda r: f"{r['cosine error']:.4f}",
            "norm distortion": lambda r: f"{r['norm distortion']:.3f}",
        },
    )
