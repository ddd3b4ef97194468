"""The aims on a GPU, and the results of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu.cases import Found, Record
from benchmarks.gpu.end_to_end import title
from benchmarks.gpu.selection import LOOP

OVERHEAD, RATE, SECONDS, SPEEDUP = 0.03, 0.5, 0.3, 10.0


def aims(sections: dict[str, Any]) -> list[Record]:
    """One line per aim: {"aim", "limit", "value", "met"}; without a value, `met` is None."""
    cases = {name: section["cases"] for name, section in sections.items()}
    return [
        _tests(cases.get("tests", {})),
        _sanitizer(cases.get("sanitizer", {})),
        *_overheads(cases.get("end_to_end", {})),
        *_rates(cases.get("micro", {})),
        *_selection(cases.get("selection", {})),
    ]


def _tests(found: Found) -> Record:
    counts = [record.get("counts", {}) for record in found.values()]
    passed, failed = (sum(c.get(name, 0) for c in counts) for name in ("passed", "failed"))
    bad = failed + sum("complaint" in r or r["status"] == "failed" for r in found.values())
    return _aim("tests marked gpu that fail", bad if passed else None, 0, at_most=True)


def _sanitizer(found: Found) -> Record:
    errors = [r["errors"] for r in found.values() if r.get("errors") is not None]
    name = "errors that compute-sanitizer finds"
    return _aim(name, sum(errors) if errors else None, 0, at_most=True)


def _overheads(found: Found) -> list[Record]:
    name = title("sjlt", "0")
    return [
        _aim(
            f"capture and sjlt over the backward pass, {case}",
            record["ways"][name]["overhead_of_backward"],
            OVERHEAD,
            at_most=True,
        )
        for case, record in found.items()
        if record["status"] == "ok"
    ] or [_aim("capture and sjlt over the backward pass", None, OVERHEAD, at_most=True)]


def _rates(found: Found) -> list[Record]:
    own = [r for r in found.values() if r.get("group") == "rademacher" and r.get("ours")]
    return [
        _aim(
            f"lora_grad_rademacher, share of the bf16 rate, {what}",
            _largest(r.get(share) for r in own),
            RATE,
            at_most=False,
        )
        for what, share in (
            ("operations carried out", "executed_share"),
            ("operations of the definition", "useful_share"),
        )
    ]


def _selection(found: Found) -> list[Record]:
    own = {dtype: found.get(f"ours, {dtype} rows", {}) for dtype in ("float32", "bfloat16")}
    loop, ours = (found.get(LOOP, {}).get("seconds"), own["float32"].get("seconds"))
    return [
        *(
            _aim(f"selection, {dtype} rows, seconds", record.get("seconds"), SECONDS, at_most=True)
            for dtype, record in own.items()
        ),
        _aim(
            "torch loop / selection", loop / ours if loop and ours else None, SPEEDUP, at_most=False
        ),
    ]


def _largest(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _aim(name: str, value: float | None, limit: float, *, at_most: bool) -> Record:
    met = None if value is None else value <= limit if at_most else value >= limit
    return {"aim": name, "limit": limit, "at_most": at_most, "value": value, "met": met}
