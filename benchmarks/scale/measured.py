"""What a machine without a GPU can measure of it: the work beside the model, and the selection.

Seconds are of one thread's processor time, which other work on the machine changes little.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from activedpo_fast._files import atomic_path
from activedpo_fast.demo.language_model import read_prompts
from activedpo_fast.demo.reviews import load_review_model
from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.gradient_rows import GradientRows
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.selection.candidates import Candidates
from activedpo_fast.selection.greedy.logdet import greedy_logdet
from activedpo_fast.selection.pair_features import Normalize
from activedpo_fast.store.shard_files import write_rows
from activedpo_fast.store.token_hashes import token_hashes

RESPONSES = 4
Made = TypeVar("Made")


def write_pool(path: Path, prompts: int) -> None:
    """Descriptions of software packages, each with four synopses and a number of its own."""
    texts = [(str(p.prompt), str(p.extra["synopsis"])) for p in read_prompts("pool")]
    with atomic_path(path) as temporary, temporary.open("w") as file:
        for n in range(prompts):
            responses = [f" {texts[(n + 7 * m) % len(texts)][1]} ({m})" for m in range(RESPONSES)]
            row = {
                "id": str(n),
                "prompt": f"{n}. {texts[n % len(texts)][0]}",
                "responses": responses,
            }
            file.write(json.dumps(row) + "\n")


def host_work(prompts: int, folder: Path) -> dict[str, Any]:
    """Seconds and resident bytes per prompt of everything that is done before and after the model:
    {"prompts", "tokens" of a response with its prompt, "stages": {name: {...}}}."""
    path = folder / f"pool-{prompts}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_pool(path, prompts)
    base, tokenizer = load_review_model()
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    extractor = FeatureExtractor(model, Sketch("sjlt", 64))
    stages: dict[str, dict[str, float]] = {}

    def stage(name: str, make: Callable[[], Made]) -> Made:
        seconds, before = time.process_time(), _resident()
        made = make()
        stages[name] = {
            "seconds": (time.process_time() - seconds) / prompts,
            "bytes": (_resident() - before) / prompts,
        }
        return made

    pool = stage("read the pool", lambda: PreferencePool.load(path))
    tokens = stage(
        "tokenize", lambda: tokenize_pool(pool, tokenizer, max_length=256, show_progress=False)
    )
    everything = range(len(tokens.sequences))
    extractor.check(tokens.only(range(2 * RESPONSES)))
    stage("plan batches", lambda: extractor.batches(tokens, everything, 4096))
    stage("hash tokens", lambda: token_hashes(tokens))
    none = torch.empty(0, 2, dtype=torch.int64)
    stage(
        "find candidates",
        lambda: Candidates.find(
            pool, PoolProcesses(None), labeled=none, asked=none, skipped=[], rules=None
        ),
    )
    length = sum(len(s.input_ids) for s in tokens.sequences) / len(everything)
    return {"prompts": prompts, "tokens": length, "stages": stages}


def storing(folder: Path, dim: int, rows: int = 8192) -> dict[str, float]:
    """Seconds per byte of rows that come to the process that writes a store."""
    gradients = synthetic_rows(rows // RESPONSES, dim)
    part = GradientRows(torch.arange(rows), gradients, torch.zeros(rows, dtype=torch.float64))
    for old in folder.glob("rows-*"):
        old.unlink()
    seconds = time.process_time()
    write_rows(folder, [part], rows, key=b"", rows_per_shard=rows, dtype=gradients.dtype)
    taken = time.process_time() - seconds
    return {"bytes": gradients.nbytes, "seconds per GB": taken / gradients.nbytes * 1e9}


def synthetic_rows(prompts: int, dim: int) -> Tensor:
    """Rows bfloat16 [prompts * RESPONSES, dim]: a spectrum that falls as i^-0.7, norms that differ,
    and a part that responses to one prompt have in common. They are as hard to choose from as
    gradients; rows of independent numbers are easier."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1).float().pow(-0.7)
    rows = torch.empty(prompts, RESPONSES, dim, dtype=torch.bfloat16)
    for part in rows.split(4096):
        n = len(part)
        common = torch.randn(n, 1, dim, generator=generator)
        own = torch.randn(n, RESPONSES, dim, generator=generator)
        scale = torch.exp(0.5 * torch.randn(n, RESPONSES, 1, generator=generator))
        part.copy_((0.5 * common + own) * spectrum / spectrum.norm() * scale)
    return rows.flatten(0, 1)


def selections(sizes: list[int], dim: int, picks: int) -> list[dict[str, Any]]:
    """For each number of prompts and each normalization, how much of the pool a pick looks at."""
    found = []
    each = torch.tensor(list(itertools.combinations(range(RESPONSES), 2)))
    for prompts in sizes:
        rows = synthetic_rows(prompts, dim)
        pairs = (RESPONSES * torch.arange(prompts)[:, None, None] + each).flatten(0, 1)
        normalizations: tuple[Normalize, ...] = ("response", "pair", None)
        for normalize in normalizations:
            seconds = time.process_time()
            ranking = greedy_logdet(rows, pairs, picks, normalize=normalize, show_progress=False)
            assert ranking.touched is not None
            found.append(
                {
                    "pairs": len(pairs),
                    "k": dim,
                    "picks": picks,
                    "normalize": normalize or "none",
                    "share": float(ranking.touched.double().mean()) / len(pairs),
                    "seconds": time.process_time() - seconds,
                }
            )
    return found


def _resident() -> int:
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:")
    )
    return int(line.split()[1]) * 1024
