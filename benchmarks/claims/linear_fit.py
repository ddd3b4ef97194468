"""How much of each known reward is linear in the features: a fit to the rewards themselves.

    python -m benchmarks.claims.linear_fit

No label is drawn: this is what a log-linear policy could learn at best from its 2,000 prompts. The
figures go to benchmarks/results/claims/linear_fit.json, from where docs/evidence.md has them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from activedpo_fast._files import write_atomic
from benchmarks.claims.jobs import WORK
from benchmarks.claims.known_reward import accuracy, earned
from benchmarks.claims.world import World, make_world

RESULT = Path("benchmarks/results/claims/linear_fit.json")
RIDGES = (1.0, 30.0, 300.0)
SEEDS = 5


def fit(world: World) -> dict[str, float]:
    """Of the ridge that is best on held-out prompts: R^2, reward and pairs ranked right there."""
    features, reward = world.features.flatten(0, 1), world.reward.flatten()
    held_features, held = world.heldout_features.flatten(0, 1), world.heldout_reward.flatten()
    eye = torch.eye(features.shape[1], dtype=torch.float64)
    found = []
    for ridge in RIDGES:
        theta = torch.linalg.solve(features.T @ features + ridge * eye, features.T @ reward)
        left = (held - held_features @ theta).square().sum() / held.square().sum()
        found.append(
            {
                "r2": 1 - float(left),
                "reward": earned(world, theta),
                "accuracy": accuracy(world, theta),
            }
        )
    return max(found, key=lambda f: f["r2"])


def main() -> None:
    """Fit all worlds and write the means over seeds."""
    torch.set_num_threads(1)
    table = {}
    for reward in ("linear", "synopsis", "reviews"):
        fits = [fit(make_world(reward, seed, WORK)) for seed in range(SEEDS)]
        table[reward] = {name: round(sum(f[name] for f in fits) / SEEDS, 3) for name in fits[0]}
        print(reward, table[reward], flush=True)
    write_atomic(RESULT, json.dumps({"seeds": SEEDS, "fits": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
