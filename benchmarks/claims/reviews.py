"""The task of controlled sentiment: a small language model is to finish reviews favorably.

The model was trained on review sentences, a prompt is the first four words of one, and the reward
is what people would rate the whole sentence, from -4 to 4, as a regression from its MiniLM
embedding predicts. Everything else is `ActiveDPOLoop` and TRL's `DPOTrainer`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from activedpo_fast.demo.reviews import Rating, load_review_model, read_review_prompts
from activedpo_fast.demo.similarity import SynopsisSimilarity
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.labels import LearnedReward, RewardOracle
from activedpo_fast.labels.learned_reward import Embed
from activedpo_fast.pool.files import jsonl_rows
from activedpo_fast.pool.items import PoolItem, Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.rewards import Reward
from activedpo_fast.pool.texts import Text
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.report.compute import count_tokens, cumulative
from activedpo_fast.selection.strategies import STRATEGIES, RewardGap
from activedpo_fast.training.evaluation import HeldoutReward
from activedpo_fast.training.heldout import heldout_files, heldout_rewards
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.trl import dpo_config
from benchmarks.claims.word_vectors import WordVectors

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYTHING = "all labels"
TRUE_DIFFERENCE = "largest true difference"
VADER_DIFFERENCE = "largest VADER difference"
TWEETS_DIFFERENCE = "largest tweets difference"
TWEETS_LABELS = "the same, and labels"  # of TWEETS_DIFFERENCE
LEARNED_DIFFERENCE = "largest learned difference"
WORDS_DIFFERENCE = "learned on word vectors"
OWN_TOKENS = "activedpo, own tokens"  # "response", of gradients of a response's own tokens only
TWEETS = Path(__file__).parent / "tweets" / "reward.safetensors"
GEMMA = Path(__file__).parent / "gemma"
# The best of 0.1, 1, 10 and 100 on four and on three runs with random picks.
LEARNED_RIDGE, WORDS_RIDGE = 1.0, 100.0
KL_SAMPLES = 150  # of the held-out responses
# Which random numbers responses are sampled with: 1, and not recorded, when a stage had one
# generator; 2 since each batch of responses has its own. Runs of one seed are paired only if it is
# the same.
SAMPLER = 2

# name: (strategy, options of the selector)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "activedpo, response": ("activedpo", {"normalize": "response"}),
    OWN_TOKENS: ("activedpo", {"normalize": "response", "gradient": "response_tokens"}),
    "activedpo, pair": ("activedpo", {"normalize": "pair"}),
    "activedpo, none": ("activedpo", {"normalize": "none"}),
    "adpo_plus": ("adpo_plus", {}),
    "apo": ("apo", {}),
    "aplp": ("aplp", {}),
    "margin_small": ("margin_small", {}),
    "margin_large": ("margin_large", {}),
    "trace": ("trace", {}),
    "trace_plus": ("trace_plus", {}),
    TRUE_DIFFERENCE: ("reward_gap", {"by": "rating"}),
    VADER_DIFFERENCE: ("reward_gap", {"by": "vader"}),
    TWEETS_DIFFERENCE: ("reward_gap", {"by": "tweets"}),
    TWEETS_LABELS: ("reward_gap", {"by": "tweets"}),
    LEARNED_DIFFERENCE: ("reward_gap", {"by": "learned"}),
    WORDS_DIFFERENCE: ("reward_gap", {"by": "words"}),
    EVERYTHING: ("random", {}),
}


@dataclass(frozen=True)
class ReviewSetting:
    """One experiment; the defaults are those of the main comparison.

    temperature: of the labels, in units of the ratings. samples: of each held-out prompt.
    model: "llama" or "gemma", the architecture.
    """

    rounds: int = 6
    batch_size: int = 64
    prompts_per_round: int = 128
    n_responses: int = 3
    temperature: float = 0.3
    beta: float = 0.1
    learning_rate: float = 2e-3
    epochs: int = 2
    train_on: str = "all"
    heldout: int = 300
    samples: int = 2
    generation: dict[str, Any] = field(
        default_factory=lambda: {"max_new_tokens": 20, "temperature": 1.0, "batch_size": 300}
    )
    lora: dict[str, Any] = field(
        default_factory=lambda: {"r": 8, "lora_alpha": 16, "target_modules": LINEARS}
    )
    selection: dict[str, Any] = field(default_factory=lambda: {"proj_dim": 4096})
    model: str = "llama"

    @property
    def sampling(self) -> dict[str, Any]:
        """`generation` by the library's names; its own are keys of stored results."""
        return {
            "max_completion_length": self.generation["max_new_tokens"],
            "temperature": self.generation["temperature"],
            "generation_batch_size": self.generation["batch_size"],
        }


def load_policy(setting: ReviewSetting, seed: int) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The language model with a fresh adapter, and its tokenizer."""
    base, tokenizer = load_review_model(*([GEMMA] if setting.model == "gemma" else []))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**setting.lora, task_type="CAUSAL_LM"))
    return model.eval(), tokenizer


def run(
    method: str,
    setting: ReviewSetting,
    seed: int,
    folder: Path,
    rating: Rating,
    show_progress: bool | None = False,
) -> dict[str, Any]:
    """All rounds of one method, in `folder`, where an interrupted run goes on.

    Returns:
        "labels", "passes" (see `report.compute`) and the metrics of `Evaluation`, each a list: the
        start first; and what `_asked` returns, each a list over the rounds.
    """
    strategy, options = METHODS[method]
    model, tokenizer = load_policy(setting, seed)
    pairs = setting.n_responses * (setting.n_responses - 1) // 2 * setting.prompts_per_round
    records = ActiveDPOLoop(
        model,
        tokenizer,
        read_review_prompts("pool"),
        RewardOracle(
            Rating(TWEETS) if method == TWEETS_LABELS else rating,
            temperature=setting.temperature,
            seed=seed,
        ),
        output_dir=folder,
        dpo_args=dpo_config(
            output_dir=str(folder / "trainer"),
            seed=seed,
            beta=setting.beta,
            max_length=64,
            learning_rate=setting.learning_rate,
            num_train_epochs=setting.epochs,
            per_device_train_batch_size=16,
        ),
        strategy=RewardGap(reward_called(options["by"], rating)) if "by" in options else strategy,
        selector_options={
            **setting.selection,
            **({} if "by" in options else options),
            "seed": seed,
        },
        batch_size=pairs if method == EVERYTHING else setting.batch_size,
        rounds=setting.rounds,
        prompts_per_round=setting.prompts_per_round,
        num_generations=setting.n_responses,
        **setting.sampling,
        train_on=setting.train_on,
        evaluate=Evaluation(tokenizer, rating, setting, folder),
        seed=seed,
        show_progress=show_progress,
    ).run()
    names = records[0].metrics
    seconds = {
        name: sum(r.seconds.get(name, 0.0) for r in records)
        for name in ("generate", "features", "select", "label", "train", "evaluate")
    }
    return {
        "sampler": SAMPLER,
        "labels": [r.labels_total for r in records],
        "seconds": seconds,
        **{name: [r.metrics[name] for r in records] for name in names},
        "passes": cumulative(
            count_tokens(
                folder,
                tokenizer,
                requires(method),
                epochs=setting.epochs,
                train_on=setting.train_on,
            )
        ),
        "win_rate": win_rates(folder),
        **_asked(folder, rating),
    }


def win_rates(folder: Path) -> list[float]:
    """After each evaluation, the share of held-out prompts whose responses are rated higher than
    at the start, on average over a prompt's responses; an equal rating counts as half."""
    rewards = np.array([heldout_rewards(path) for path in heldout_files(folder)])
    difference = rewards - rewards[0]
    return ((difference > 0) + (difference == 0) / 2).mean(axis=1).tolist()


def reward_called(name: str, rating: Rating) -> Reward:
    """A reward that picks are made by: "rating", the oracle's own, "vader", "tweets" (see
    tweets/README.md), or one learned from the labels so far: "learned" on the encoder in which the
    oracle's rating is linear, "words" on one that the oracle does not have."""
    if name == "tweets":
        return Rating(TWEETS)
    if name == "learned":
        return LearnedReward(_of_whole_texts(SynopsisSimilarity().embed), ridge=LEARNED_RIDGE)
    if name == "words":
        return LearnedReward(_of_whole_texts(WordVectors().embed), ridge=WORDS_RIDGE)
    return vader if name == "vader" else rating


def _of_whole_texts(embed: Callable[[list[str]], torch.Tensor]) -> Embed:
    """An encoder of prompts and responses from one of texts."""

    def embed_both(prompts: Sequence[Text], responses: Sequence[Text]) -> torch.Tensor:
        return embed([f"{p}{r}" for p, r in zip(prompts, responses, strict=True)])

    return embed_both


def vader(
    prompts: Sequence[Text], responses: Sequence[Text], extras: Sequence[Mapping[str, Any]]
) -> list[float]:
    """VADER's compound score of prompt and response together, from -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # `make claims` has it

    analyzer = SentimentIntensityAnalyzer()
    texts = [f"{p}{r}" for p, r in zip(prompts, responses, strict=True)]
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def requires(method: str) -> frozenset[str]:
    """The signals of a method's strategy."""
    strategy = METHODS[method][0]
    return STRATEGIES[strategy].requires


def _asked(folder: Path, rating: Rating) -> dict[str, list[float]]:
    """Of each round's labels: "agreement", the share that prefers the response with the higher
    rating, and "difference", how far the two ratings are apart on average."""
    found: dict[str, list[float]] = {"agreement": [], "difference": []}
    for path in sorted(folder.glob("round-*/labels.jsonl")):
        rows = [row for _, row in jsonl_rows(path)]
        first, second = (
            np.array(rating([r["prompt"] for r in rows], [r["responses"][n] for r in rows], []))
            for n in (0, 1)
        )
        preferred = np.array([r["label"] == 0 for r in rows])
        found["agreement"].append(float(((first > second) == preferred).mean()))
        found["difference"].append(float(np.abs(first - second).mean()))
    return found


class Evaluation:
    """`HeldoutReward` and beside it `vader`, the mean of VADER's compound score; `words` a
    response; `kl`, the mean of log pi - log pi_ref over the samples, in nats.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rating: Rating,
        setting: ReviewSetting,
        folder: Path,
    ) -> None:
        self._tokenizer = tokenizer
        self._heldout = HeldoutReward(
            read_review_prompts("heldout")[: setting.heldout],
            rating,
            output_dir=folder,
            processing_class=tokenizer,
            samples=setting.samples,
            show_progress=False,
            **setting.sampling,
        )

    def __call__(self, model: PeftModel) -> dict[str, float]:
        metrics = self._heldout(model)
        prompts, responses = self._heldout.prompts, self._heldout.responses
        compound = vader([p.prompt for p in prompts], responses, [])
        return {
            **{name: metrics[name] for name in ("reward", "gain_se")},
            "vader": float(np.mean(compound)),
            "words": float(np.mean([len(r.split()) for r in responses])),
            "kl": self._divergence(model, prompts, responses),
        }

    def _divergence(
        self, model: PeftModel, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> float:
        # A pool's items have two different responses: one is another sample for the same prompt.
        half = len(prompts) // 2
        pool = PreferencePool(
            PoolItem(p.id, p.prompt, (r, other))
            for p, r, other in list(zip(prompts, responses, responses[half:], strict=False))[
                : KL_SAMPLES // 2
            ]
            if r.strip() and other.strip() and r != other
        )
        tokens = tokenize_pool(pool, self._tokenizer, show_progress=False)
        extractor = FeatureExtractor(model, Sketch("sjlt", 8), verify=False)
        own = extractor.logps(tokens, show_progress=False)
        with model.disable_adapter():
            ref = extractor.logps(tokens, show_progress=False)
        return float((own - ref).mean())


def quiet() -> None:
    """Log only errors: hundreds of runs print the same messages."""
    import datasets
    import transformers

    for name in ("activedpo_fast", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
