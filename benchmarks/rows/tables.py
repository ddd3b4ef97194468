"""Tables of `make bench`: gradient rows, their overhead, and projections."""

from __future__ import annotations

from benchmarks.markdown import Row, optional, table

GROUPS = ("rows", "overhead", "projection")


def tables(rows: list[Row]) -> dict[str, str]:
    """Markdown by table name: "summary", "rows: <workload>", "overhead", "projection"."""
    found: dict[str, str] = {}
    of_group = {name: [r for r in rows if r["group"] == name] for name in GROUPS}
    workloads = list(dict.fromkeys(r["workload"] for r in of_group["rows"]))
    if workloads:
        found["summary"] = _summary(of_group["rows"], workloads)
    for workload in workloads:
        found[f"rows: {workload}"] = _workload(
            [r for r in of_group["rows"] if r["workload"] == workload]
        )
    if of_group["overhead"]:
        found["overhead"] = _overhead(of_group["overhead"])
    if of_group["projection"]:
        found["projection"] = _projection(of_group["projection"])
    return found


def _summary(rows: list[Row], workloads: list[str]) -> str:
    """Times relative to a plain forward pass, for one of our sketches and all peers."""
    ratio = {(r["contender"], r["workload"]): f"{r['ratio']:.2f}" for r in rows}
    shown = [
        c
        for c in dict.fromkeys(r["contender"] for r in rows)
        if "sjlt" in c or not c.startswith(("**ours**", "floor"))
    ]
    return table(
        [{"contender": c} for c in shown],
        {
            "gradient rows, × one plain forward pass": lambda r: r["contender"],
            **{w: lambda r, w=w: ratio.get((r["contender"], w), "–") for w in workloads},
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


def _overhead(rows: list[Row]) -> str:
    return table(
        rows,
        {
            "workload": lambda r: r["workload"],
            "sketch": lambda r: r["contender"],
            "capture and sketch over the same passes": lambda r: f"{r['ratio'] - 1:+.1%}",
        },
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
