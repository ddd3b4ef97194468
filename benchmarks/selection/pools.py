"""The feature rows that `benchmarks.selection` selects from: real rows, of the demo's policy.

The demo's model after one round of DPO (the adapter of `fidelity.py`) samples 8 responses to each
of the demo's 4,000 prompts; the library sketches their gradient rows to 8192 numbers. That takes
20 minutes on two cores, is kept in the work folder in parts of 200 prompts, and continues there
after an interruption.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from activedpo_fast import FeatureExtractor, PreferencePool, Sketch
from activedpo_fast.demo.language_model import read_prompts
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.store.store import FeatureStore
from activedpo_fast.training.generation import generate_responses
from activedpo_fast.training.prompts import draw_prompts
from benchmarks.fidelity.cases import policy
from benchmarks.fidelity.measures import DEMO, SEED, TOKENS

RESPONSES = 8  # a prompt
DIM = 8192
PROMPTS_A_PART, PARTS = 200, 20
MAX_LENGTH = 512  # the model's positions: nothing is cut


@dataclass(frozen=True)
class Rows:
    """Gradient rows float32 [P * RESPONSES, DIM], prompt by prompt, not normalized."""

    rows: Tensor

    def problem(
        self, n_pairs: int, k: int, responses: int, first_prompt: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(rows float32 [R, k], pairs int64 [n_pairs, 2]) with this many responses per prompt.

        The pairs are the first of consecutive prompts, all M (M - 1) / 2 of each in the library's
        order. k is DIM divided by a power of two: then halves of a row are added. As a run of
        positions lands on a uniform bucket, whose leading bit that drops, it is a sketch of the
        same distribution as the library's for this k, though with other draws.
        """
        each = torch.combinations(torch.arange(responses))
        prompts = -(-n_pairs // len(each))
        by_prompt = self.rows.view(-1, RESPONSES, self.rows.shape[1])
        assert first_prompt + prompts <= len(by_prompt), f"{n_pairs} pairs: not so many prompts"
        taken = by_prompt[first_prompt : first_prompt + prompts, :responses].flatten(0, 1)
        while taken.shape[1] > k:
            left, right = taken.chunk(2, dim=1)
            taken = left + right
        starts = responses * torch.arange(prompts)
        pairs = (starts[:, None, None] + each).flatten(0, 1)[:n_pairs]
        return taken.contiguous(), pairs


def load(folder: Path, adapter_folder: Path, parts: int = PARTS) -> Rows:
    """The rows of the first `parts` parts; those not in `folder` are computed."""
    paths = [folder / f"part-{part:02d}" for part in range(parts)]
    if any(not _is_complete(path) for path in paths):
        model, tokenizer = policy("trained", adapter_folder)
        for part, path in enumerate(tqdm(paths, desc="pool", disable=None)):
            if not _is_complete(path):
                make_part(part, path, model, tokenizer)
    return Rows(torch.cat([FeatureStore.open(path / "rows").load().gradients for path in paths]))


def make_part(part: int, path: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sample responses and compute the rows of one part; existing files stay."""
    drawn = draw_prompts(read_prompts("pool"), part, PROMPTS_A_PART, set(), SEED)
    if not (path / "pool.jsonl").exists():
        generate_responses(
            model, tokenizer, drawn, num_generations=RESPONSES, seed=part, **DEMO.generation
        ).to_jsonl(path / "pool.jsonl")
    pool = PreferencePool.from_jsonl(path / "pool.jsonl")
    tokens = tokenize_pool(pool, tokenizer, max_length=MAX_LENGTH)
    sketch = Sketch("sjlt", DIM)
    settings = {
        "policy": "trained",
        "sketch": [sketch.method, sketch.dim, sketch.seed],
        "beta": DEMO.dpo["beta"],
        "max_length": MAX_LENGTH,
    }
    store = FeatureStore.create(path / "rows", pool, settings, skipped=tokens.skipped)
    store.fill(
        FeatureExtractor(model, sketch, beta=DEMO.dpo["beta"], max_tokens_per_batch=TOKENS), tokens
    )


def _is_complete(path: Path) -> bool:
    manifest = path / "rows" / "manifest.json"
    return manifest.exists() and not FeatureStore.open(path / "rows", complete=False).missing_rows()
