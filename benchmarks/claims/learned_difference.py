"""How well the labels so far tell which pairs of the next round are far apart.

    python -m benchmarks.claims.learned_difference

A ridge regression from features of a pair, the model's own or an encoder's, to the labels of
earlier rounds, in the kept folders of the runs with random picks and Gemma's architecture (`make
claims` leaves them in runs/claims). What it predicts for the candidates of the next round is
compared with the oracle's own ratings, and so is what rewards from outside say. The figures go to
benchmarks/results/claims/learned_difference.json, from where docs/evidence.md has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from activedpo_fast._files import write_atomic
from activedpo_fast.demo.reviews import Rating
from activedpo_fast.demo.similarity import SynopsisSimilarity
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.files import jsonl_rows
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import tokenize_pool
from benchmarks.claims.jobs import WORK
from benchmarks.claims.reviews import ReviewSetting, load_policy, quiet, reward_called
from benchmarks.claims.word_vectors import WordVectors

RESULT = Path("benchmarks/results/claims/learned_difference.json")
RUNS = "random_____model____gemma__-"
RIDGES = (0.1, 1.0, 10.0, 100.0)
MINILM, HALFWAY = "MiniLM embeddings", "MiniLM, halfway"  # the oracle is linear in the former
WORDS = "word vectors"
PICKED = 64  # of a round's candidates


class Round(NamedTuple):
    """A round's candidates.

    features: by name, float64 [N, d], differences of two responses. rewards: by name, float64 [N],
    differences by a reward from outside. apart: float64 [N], the difference of their ratings.
    labeled: int64 [B], candidates with a label; labels: float64 [B], 1 where the first response is
    preferred, else -1.
    """

    features: dict[str, Tensor]
    rewards: dict[str, Tensor]
    apart: Tensor
    labeled: Tensor
    labels: Tensor


def rounds(folder: Path, seed: int, rating: Rating) -> Iterator[Round]:
    """Yield the rounds of a run, with features of the policy at its start."""
    setting = ReviewSetting(model="gemma")
    model, tokenizer = load_policy(setting, seed)
    extractor = FeatureExtractor(model, Sketch("sjlt", setting.selection["proj_dim"]))
    encoders = {
        MINILM: SynopsisSimilarity().embed,
        HALFWAY: SynopsisSimilarity(layer=3).embed,
        WORDS: WordVectors().embed,
    }
    for path in sorted(folder.glob("round-*/pool.jsonl")):
        pool = PreferencePool.from_jsonl(path)
        tokens = tokenize_pool(pool, tokenizer, max_length=64, show_progress=False)
        texts = [(item.prompt, response) for item in pool for response in item.responses]
        prompts, responses = [p for p, _ in texts], [r for _, r in texts]
        ratings = torch.tensor(rating(prompts, responses, []))
        outside = {
            name: torch.tensor(reward_called(called, rating)(prompts, responses, [])).double()
            for name, called in (("VADER", "vader"), ("a rating learned on tweets", "tweets"))
        }
        first, second = pool.pairs().unbind(1)
        rows = {
            "hidden states": extractor.hidden(tokens, show_progress=False),
            "gradients": extractor.gradients(tokens, show_progress=False).gradients,
            **{name: embed([f"{p}{r}" for p, r in texts]) for name, embed in encoders.items()},
        }
        candidates = {
            (item.id, *pair): n
            for n, (item, pair) in enumerate(
                (item, (item.responses[a], item.responses[b]))
                for item in pool
                for a in range(len(item.responses))
                for b in range(a + 1, len(item.responses))
            )
        }
        answers = [row for _, row in jsonl_rows(path.parent / "labels.jsonl")]
        yield Round(
            {name: (x[first] - x[second]).double() for name, x in rows.items()},
            {name: x[first] - x[second] for name, x in outside.items()},
            (ratings[first] - ratings[second]).double(),
            torch.tensor([candidates[(row["id"], *row["responses"])] for row in answers]),
            torch.tensor([1.0 - 2.0 * row["label"] for row in answers], dtype=torch.float64),
        )


def predicted(known: list[Round], new: Round, name: str) -> dict[str, float]:
    """The prediction for a new round's candidates, of the ridge that suits them best."""
    x = torch.cat([r.features[name][r.labeled] for r in known])
    labels = torch.cat([r.labels for r in known])
    scale = x.norm(dim=1).mean()
    kernel, to_new = x @ x.T / scale**2, new.features[name] @ x.T / scale**2
    found = []
    for ridge in RIDGES:
        weights = torch.linalg.solve(kernel + ridge * torch.eye(len(x), dtype=x.dtype), labels)
        found.append(judged(to_new @ weights, new.apart))
    return max(found, key=lambda f: f["apart"])


def judged(guess: Tensor, apart: Tensor) -> dict[str, float]:
    """How good a guess of the differences is.

    correlation: with the true ones. right: share of the pairs with the right sign. apart: mean true
    difference of the pairs that are furthest apart by the guess.
    """
    furthest = guess.abs().topk(PICKED).indices
    return {
        "correlation": float(torch.corrcoef(torch.stack([guess, apart]))[0, 1]),
        "right": float((guess.sign() == apart.sign()).double().mean()),
        "apart": float(apart[furthest].abs().mean()),
    }


def main() -> None:
    """Compare all kept runs and write the means over them."""
    torch.set_num_threads(1)
    quiet()
    rating = Rating()
    records: dict[tuple[str, int], list[dict[str, float]]] = {}
    folders = sorted((WORK / "reviews").glob(f"{RUNS}*"))
    for folder in folders:
        known: list[Round] = []
        for new in rounds(folder, int(folder.name.rsplit("-", 1)[1]), rating):
            count = sum(len(r.labels) for r in known)
            for name in new.features if known else ():
                records.setdefault((name, count), []).append(predicted(known, new, name))
            for name, guess in new.rewards.items() if known else ():
                records.setdefault((name, count), []).append(judged(guess, new.apart))
            distance = new.apart.abs()
            for name, chosen in (("random", distance), ("the truth", distance.topk(PICKED).values)):
                if known:
                    records.setdefault((name, count), []).append({"apart": float(chosen.mean())})
            known.append(new)
        print(f"{folder.name}: {len(known)} rounds", flush=True)
    found = [
        {
            "by": name,
            "labels": count,
            **{key: round(sum(r[key] for r in runs) / len(runs), 3) for key in runs[0]},
        }
        for (name, count), runs in sorted(records.items())
    ]
    write_atomic(RESULT, json.dumps({"seeds": len(folders), "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
