#!/usr/bin/env python3
"""Make the prompts and the reward of the review task: everything except the language model.

Prompts are the first four words of review sentences. The reward is a ridge regression from the
MiniLM embedding of a sentence to the mean of twenty people's ratings of it, from -4 to 4. Its fit
on held-out reviews is written to the same folder. The same regression on tweets is the reward model
from elsewhere of benchmarks/claims, and goes to its folder.

Example:
    python scripts/make_review_assets.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import review_texts
import torch
from safetensors.torch import save_file
from train_review_model import ASSETS, prompt_of

from activedpo_fast.demo.similarity import SynopsisSimilarity

TWEETS = Path(__file__).parents[1] / "benchmarks" / "claims" / "tweets"
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def write_prompts(sentences: list[review_texts.Sentence], folder: Path) -> dict[str, int]:
    """Write `pool.parquet` and `heldout.parquet`: id and prompt, every prompt once over both."""
    seen: set[str] = set()
    counts = {}
    for name, heldout in (("pool", False), ("heldout", True)):
        rows = []
        for sentence in sentences:
            prompt = prompt_of(sentence.text)
            if sentence.heldout is heldout and prompt not in seen:
                seen.add(prompt)
                rows.append({"id": sentence.id, "prompt": prompt})
        pq.write_table(
            pa.Table.from_pylist(rows),
            folder / f"{name}.parquet",
            compression="zstd",
            compression_level=19,
        )
        counts[name] = len(rows)
    return counts


def fit(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return weights of the columns of x and, last, of a constant, which is not penalized."""
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    design = torch.cat([x, ones], dim=1)
    ridge = torch.full((design.shape[1],), penalty, dtype=x.dtype)
    ridge[-1] = 0
    return torch.linalg.solve(design.T @ design + ridge.diag(), design.T @ y)


def r_squared(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> float:
    """Return R² of the regression's prediction."""
    error = y - (x @ weights[:-1] + weights[-1])
    return float(1 - error.square().sum() / (y - y.mean()).square().sum())


def write_reward(sentences: list[review_texts.Sentence], folder: Path) -> dict[str, object]:
    """Write `reward.safetensors` with `weights` [384] and `bias`; return how well it fits."""
    embedded = SynopsisSimilarity().embed([s.text for s in sentences]).double()
    rating = torch.tensor([s.rating for s in sentences], dtype=torch.float64)
    heldout = torch.tensor([s.heldout for s in sentences])
    x, y = embedded[~heldout], rating[~heldout]
    inner = torch.arange(len(x)) % 5 == 0  # for choosing the penalty
    penalty = max(
        PENALTIES, key=lambda p: r_squared(x[inner], y[inner], fit(x[~inner], y[~inner], p))
    )
    weights = fit(x, y, penalty)
    save_file(
        {"weights": weights[:-1].float(), "bias": weights[-1:].float()},
        folder / "reward.safetensors",
    )
    (folder / "reward.safetensors").chmod(0o644)
    return {
        "penalty": penalty,
        "train_r2": round(r_squared(x, y, weights), 3),
        "heldout_r2": round(r_squared(embedded[heldout], rating[heldout], weights), 3),
        "rating_mean": round(float(rating.mean()), 3),
        "rating_sd": round(float(rating.std()), 3),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ASSETS / "reviews", help="folder to write to")
    parser.add_argument(
        "--tweets", type=Path, default=TWEETS, help="folder of the regression on tweets"
    )
    parser.add_argument(
        "--texts", type=Path, default=Path("runs/reviews"), help="folder to download the texts to"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = review_texts.fetch(args.texts)
    sentences = [s for name in review_texts.REVIEWS for s in review_texts.read(folder, name)]
    counts = write_prompts(sentences, args.out)
    summary = {"prompts": counts, "reward": write_reward(sentences, args.out)}
    (args.out / "assets.json").write_text(json.dumps(summary, indent=2) + "\n")
    args.tweets.mkdir(parents=True, exist_ok=True)
    fits = write_reward(review_texts.read(folder, "tweets"), args.tweets)
    (args.tweets / "fit.json").write_text(json.dumps(fits, indent=2) + "\n")
    print(json.dumps(summary | {"tweets": fits}, indent=2))


if __name__ == "__main__":
    main()
