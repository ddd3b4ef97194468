"""The review task with its language model linearized: the model's own gradients as features.

To first order in the adapter's weights the policy is log-linear in the gradients of its log-probs.
So responses are sampled from the model before DPO, the features of each are the gradient of its
log-prob, and the policy reweights the samples of a prompt. The reward is that of the review task.
Everything else is as with the other known rewards: exact, and hundreds of seeds.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from activedpo_fast._files import atomic_path
from activedpo_fast.demo.reviews import Rating, read_review_prompts
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.training.generation import generate_responses
from benchmarks.claims.components import principal_components
from benchmarks.claims.reviews import ReviewSetting, load_policy

PROMPTS = 3200  # a few lack distinct responses
DIM = 256  # principal components that are kept of the sketched gradients
SKETCHED = 4096


def review_gradients(folder: Path, responses: int) -> tuple[Tensor, Tensor]:
    """Gradients of sampled responses, less their prompt's mean, and the responses' ratings.

    Returns:
        float64 [P, responses, DIM] in principal components, and [P, responses].
    """
    path = folder / "review_gradients.npz"
    if not path.exists():
        gradients, ratings = _taken(responses)
        with atomic_path(path) as temporary:
            np.savez(temporary, gradients=gradients.float().numpy(), ratings=ratings.numpy())
    with np.load(path) as arrays:
        return (
            torch.from_numpy(arrays["gradients"]).double(),
            torch.from_numpy(arrays["ratings"]).double(),
        )


def _taken(responses: int) -> tuple[Tensor, Tensor]:
    setting = ReviewSetting()
    model, tokenizer = load_policy(setting, seed=0)
    prompts = read_review_prompts("pool")
    random.Random(0).shuffle(prompts)
    pool = generate_responses(
        model, tokenizer, prompts[:PROMPTS], num_generations=responses, seed=0, **setting.sampling
    )
    tokens = tokenize_pool(pool, tokenizer)
    extractor = FeatureExtractor(
        model, Sketch("sjlt", SKETCHED), beta=1.0, pad_token_id=tokenizer.pad_token_id or 0
    )
    rows = extractor.gradients(tokens).gradients.view(len(pool), responses, SKETCHED)
    rows = rows - rows.mean(dim=1, keepdim=True)
    texts = [(item.prompt, response) for item in pool for response in item.responses]
    ratings = Rating()([p for p, _ in texts], [r for _, r in texts], [])
    return (principal_components(rows, DIM), torch.tensor(ratings).view(len(pool), responses))
