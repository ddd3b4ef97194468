"""A pool bigger than memory: how long a selection from disk takes, and how much memory it holds.

    python -m benchmarks.selection.on_disk --help

Writes rows of random numbers with norms that differ from row to row (the norms of gradients do),
two responses per prompt, as `activedpo features` writes its shards; they stay in the work folder.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from tqdm.auto import tqdm

from activedpo_fast._files import atomic_path, write_atomic
from activedpo_fast.selection.greedy.logdet import greedy_logdet
from activedpo_fast.store.rows import StoredRows
from benchmarks.fidelity.cases import environment

SHARD = 8192


def write_rows(folder: Path, n: int, k: int) -> list[Path]:
    """Write shards of n rows [k] in bfloat16; existing shards are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, first in enumerate(tqdm(range(0, n, SHARD), desc="writing", disable=None)):
        path = folder / f"rows-{shard:05d}.safetensors"
        paths.append(path)
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(shard)
        m = min(SHARD, n - first)
        rows = torch.randn(m, k, generator=generator, dtype=torch.float32)
        rows *= torch.exp(0.5 * torch.randn(m, 1, generator=generator))
        with atomic_path(path) as temporary:
            save_file({"gradients": rows.to(torch.bfloat16)}, temporary)
    return paths


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, in GiB."""
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) / 2**20


def main(
    rows: Annotated[int, typer.Option(help="How many gradient rows.")] = 1_000_000,
    dim: Annotated[int, typer.Option(help="k, numbers in a row.")] = 8192,
    picks: Annotated[int, typer.Option(help="B, pairs to pick.")] = 50,
    work: Annotated[Path, typer.Option(help="Folder for the rows (2 rows dim bytes).")] = Path(
        "runs/selection/on-disk"
    ),
    out: Annotated[Path, typer.Option(help="The figures, JSON.")] = Path(
        "benchmarks/results/selection_on_disk.json"
    ),
) -> None:
    """Select from rows on disk, not normalized and normalized, and print time and memory."""
    stored = StoredRows.open(write_rows(work / f"{rows}x{dim}", rows, dim))
    pairs = torch.arange(rows // 2 * 2).view(-1, 2)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    found = []
    for normalize in (None, "response"):
        started = time.perf_counter()
        ranking = greedy_logdet(stored, pairs, picks, normalize=normalize)
        seconds = time.perf_counter() - started
        assert ranking.touched is not None
        found.append(
            {
                "normalize": normalize or "none",
                "seconds": seconds,
                "touched": int(ranking.touched.sum()),
                "peak_gib": resident("VmHWM"),
            }
        )
        print(
            f"normalize {normalize}: {seconds:.1f} s, {found[-1]['touched']} rows looked at "
            f"after the first scores, peak {found[-1]['peak_gib']:.2f} GiB resident"
        )
    # The first run may read from the disk, later ones from the page cache.
    started = time.perf_counter()
    for _ in stored.chunks(4096):
        pass
    result = {
        "environment": environment(),
        "rows": rows,
        "pairs": len(pairs),
        "k": dim,
        "picks": picks,
        "dtype": "bfloat16",
        "gib": stored.nbytes / 2**30,
        "read_once_seconds": time.perf_counter() - started,
        "runs": found,
    }
    write_atomic(out, json.dumps(result, indent=1) + "\n")
    print(f"reading the {result['gib']:.1f} GiB once: {result['read_once_seconds']:.1f} s; {out}")


if __name__ == "__main__":
    typer.run(main)
