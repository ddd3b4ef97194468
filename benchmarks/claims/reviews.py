"""The task of controlled sentiment: a small language model is to finish reviews favorably.

The model was trained on review sentences, a prompt is the first four words of one, and the reward
is what people would rate the whole sentence, from -4 to 4, as a regression from its MiniLM
embedding predicts. Everything else is `ActiveDPOLoop` and TRL's `DPOTrainer`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from activedpo_fast._files import write_atomic
from activedpo_fast.data import PoolItem, PreferencePool, Prompt, Text
from activedpo_fast.demo.similarity import SynopsisSimilarity
from activedpo_fast.features.extractor import FeatureExtractor
from activedpo_fast.features.sketch import Sketch
from activedpo_fast.generation import respond
from activedpo_fast.labeling import RewardOracle
from activedpo_fast.loop import ActiveDPOLoop
from activedpo_fast.tokenization import tokenize_pool
from activedpo_fast.trl import dpo_config
from benchmarks.claims.trial_strategies import TRIALS

ASSETS = Path("activedpo_fast/demo/assets/reviews")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYTHING = "all labels"
KL_SAMPLES = 150  # of the held-out responses

# name: (strategy, options of the selector)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "activedpo, response": ("activedpo", {"normalize": "response"}),
    "activedpo, pair": ("activedpo", {"normalize": "pair"}),
    "activedpo, none": ("activedpo", {"normalize": "none"}),
    "adpo_plus": ("adpo_plus", {}),
    "apo": ("apo", {}),
    "aplp": ("aplp", {}),
    "margin_small": ("margin_small", {}),
    "margin_large": ("margin_large", {}),
    "trace": ("trace", {}),
    "trace_plus": ("trace_plus", {}),
    EVERYTHING: ("random", {}),
}


@dataclass(frozen=True)
class ReviewSetting:
    """One experiment; the defaults are those of the main comparison.

    temperature: of the labels, in units of the ratings. samples: of each held-out prompt.
    """

    rounds: int = 6
    batch_size: int = 32
    prompts_per_round: int = 100
    n_responses: int = 3
    temperature: float = 0.3
    beta: float = 0.1
    learning_rate: float = 1e-3
    epochs: int = 2
    train_on: str = "all"
    heldout: int = 300
    samples: int = 2
    generation: dict[str, Any] = field(default_factory=lambda: {
        "max_new_tokens": 20, "temperature": 1.0, "batch_size": 300})
    lora: dict[str, Any] = field(default_factory=lambda: {
        "r": 8, "lora_alpha": 16, "target_modules": LINEARS})
    selection: dict[str, Any] = field(default_factory=lambda: {"proj_dim": 4096})


class Rating:
    """The predicted mean rating of prompt and response together, -4 to 4."""

    def __init__(self) -> None:
        tensors = load_file(ASSETS / "reward.safetensors")
        self._weights, self._bias = tensors["weights"], tensors["bias"]
        self._embed = SynopsisSimilarity().embed

    def __call__(self, prompts: Sequence[Text], responses: Sequence[Text],
                 extras: Sequence[Mapping[str, Any]]) -> list[float]:
        texts = [f"{p}{r}" for p, r in zip(prompts, responses, strict=True)]
        return (self._embed(texts) @ self._weights + self._bias).tolist()


def read_prompts(split: str) -> list[Prompt]:
    """`pool` or `heldout`."""
    return [Prompt(row["id"], row["prompt"])
            for row in pq.read_table(ASSETS / f"{split}.parquet").to_pylist()]


def load_policy(setting: ReviewSetting, seed: int) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The language model with a fresh adapter, and its tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "model", dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**setting.lora, task_type="CAUSAL_LM"))
    return model.eval(), AutoTokenizer.from_pretrained(ASSETS / "model")


def run(method: str, setting: ReviewSetting, seed: int, folder: Path, rating: Rating,
        show_progress: bool | None = False) -> dict[str, Any]:
    """All rounds of one method, in `folder`, where an interrupted run goes on.

    Returns:
        "labels" and the metrics of `Evaluation`, each a list: the start first.
    """
    strategy, options = METHODS[method]
    model, tokenizer = load_policy(setting, seed)
    pairs = setting.n_responses * (setting.n_responses - 1) // 2 * setting.prompts_per_round
    records = ActiveDPOLoop(
        model, tokenizer, read_prompts("pool"),
        RewardOracle(rating, temperature=setting.temperature, seed=seed),
        output_dir=folder,
        dpo_args=dpo_config(
            output_dir=str(folder / "trainer"), seed=seed, beta=setting.beta, max_length=64,
            learning_rate=setting.learning_rate, num_train_epochs=setting.epochs,
            per_device_train_batch_size=16),
        strategy=TRIALS[strategy](**options) if strategy in TRIALS else strategy,
        selector_options={**setting.selection, **({} if strategy in TRIALS else options),
                          "seed": seed},
        batch_size=pairs if method == EVERYTHING else setting.batch_size,
        rounds=setting.rounds,
        prompts_per_round=setting.prompts_per_round,
        n_responses=setting.n_responses,
        generation=setting.generation,
        train_on=setting.train_on,  # type: ignore[arg-type]
        evaluate=Evaluation(tokenizer, rating, setting, folder),
        seed=seed,
        show_progress=show_progress,
    ).run()
    names = records[0].metrics
    seconds = {name: sum(r.seconds.get(name, 0.0) for r in records) for name in
               ("generate", "features", "select", "label", "train", "evaluate")}
    return {"labels": [r.labels_total for r in records], "seconds": seconds,
            **{name: [r.metrics[name] for r in records] for name in names}}


class Evaluation:
    """Sampled responses to the held-out prompts, the same prompts and seed at each call.

    Its metrics: `reward`, the mean predicted rating, and `gain_se`, the standard error of its
    difference from the start over prompts; `vader`, the mean of VADER's compound score; `words` a
    response; `kl`, the mean of log pi - log pi_ref over the samples, in nats.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rating: Rating, setting: ReviewSetting,
                 folder: Path) -> None:
        self._tokenizer = tokenizer
        self._rating = rating
        self._setting = setting
        self._start = folder / "heldout-start.json"
        prompts = read_prompts("heldout")[: setting.heldout]
        self._prompts = [Prompt(f"{p.id}/{n}", p.prompt) for n in range(setting.samples)
                         for p in prompts]

    def __call__(self, model: PeftModel) -> dict[str, float]:
        setting = self._setting
        options = {**setting.generation, "seed": 1}
        responses = respond(model, self._tokenizer, self._prompts, show_progress=False, **options)
        texts = [f"{p.prompt}{r}" for p, r in zip(self._prompts, responses, strict=True)]
        reward = np.array(self._rating([p.prompt for p in self._prompts], responses,
                                       [{}] * len(responses)))
        by_prompt = reward.reshape(setting.samples, -1).mean(axis=0)
        gain = by_prompt - self._at_start(by_prompt)
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # `make claims` has it

        analyzer = SentimentIntensityAnalyzer()
        return {
            "reward": float(reward.mean()),
            "gain_se": float(gain.std(ddof=1) / np.sqrt(len(gain))),
            "vader": float(np.mean([analyzer.polarity_scores(t)["compound"] for t in texts])),
            "words": float(np.mean([len(r.split()) for r in responses])),
            "kl": self._divergence(model, responses),
        }

    def _at_start(self, by_prompt: NDArray[np.float64]) -> NDArray[np.float64]:
        """The rewards at the start, which is the first call in a folder."""
        if not self._start.exists():
            write_atomic(self._start, json.dumps([round(float(r), 6) for r in by_prompt]))
        return np.array(json.loads(self._start.read_text()))

    def _divergence(self, model: PeftModel, responses: list[str]) -> float:
        pool = PreferencePool(
            PoolItem(p.id, p.prompt, (r, f"{r} .")) for p, r in
            zip(self._prompts[:KL_SAMPLES], responses, strict=False) if r.strip())
        tokens = tokenize_pool(pool, self._tokenizer, show_progress=False)
        extractor = FeatureExtractor(model, Sketch("sjlt", 8), verify=False)
        own = extractor.logps(tokens, show_progress=False)
        with model.disable_adapter():
            ref = extractor.logps(tokens, show_progress=False)
        return float((own - ref)[::2].mean())


def quiet() -> None:
    """Only what went wrong: hundreds of runs say the same things."""
    import datasets
    import transformers

    for name in ("activedpo_fast", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def definition(setting: ReviewSetting) -> dict[str, Any]:
    """What is unusual of a setting, as JSON values."""
    usual = asdict(ReviewSetting())
    return {name: value for name, value in asdict(setting).items() if value != usual[name]}
