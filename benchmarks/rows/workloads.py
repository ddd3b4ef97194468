"""The workloads of the benchmarks: a LoRA model and a tokenized pool of real text each.

Adapters have B ≠ 0, as after some training: at B = 0 the gradients of A are zero and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from activedpo_fast import FeatureExtractor, Sketch
from activedpo_fast.demo.language_model import load_base, read_prompts
from activedpo_fast.demo.settings import SETTINGS
from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse, tokenize_pool
from activedpo_fast.training.generation import generate_responses
from benchmarks.rows.measure import seconds


@dataclass
class Workload:
    """A model and the pool whose gradient rows are taken.

    Attributes:
        rounds: how often a contender is timed, unless it is slow.
        k: the dimension that every sketch projects to.
    """

    name: str
    model: PeftModel
    tokenized: TokenizedPool
    rounds: int
    k: int = 4096

    @cached_property
    def exact(self) -> torch.Tensor:
        """The gradient rows without a sketch, float32 [R, D], by our own capture.

        The suite compares them with autograd's; `test_rows.py` does so once more on this model.
        """
        extractor = FeatureExtractor(self.model, Sketch("none"), beta=1.0)
        return extractor.gradients(self.tokenized, show_progress=False).gradients

    @cached_property
    def forward(self) -> Callable[[], None]:
        """The reference time: one plain forward pass over the pool, at its best batch size."""
        candidates = [
            PlainForward(self.model, self.tokenized, tokens) for tokens in (512, 1024, 2048, 4096)
        ]
        return min(candidates, key=lambda forward: forward.seconds(2))

    def describe(self) -> str:
        lengths = [len(s.input_ids) for s in self.tokenized.sequences]
        starts = [s.completion_start for s in self.tokenized.sequences]
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters()) - trainable
        prompt, response = (sum(x) / len(lengths) for x in (starts, lengths))
        return (
            f"{total / 1e6:.1f} M parameters, {trainable / 1e3:.0f} k trainable; "
            f"{len(lengths)} responses of {response - prompt:.0f} tokens to prompts of "
            f"{prompt:.0f} (means)"
        )


class PlainForward:
    """Full logits of separate, padded sequences: the least that an uncertainty-based selector
    costs.

    Not even the log-probs are taken from the logits.
    """

    def __init__(self, model: nn.Module, tokenized: TokenizedPool, tokens_per_batch: int) -> None:
        self.model = model
        self.tokens_per_batch = tokens_per_batch
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        order = sorted((s.input_ids for s in tokenized.sequences), key=len, reverse=True)
        while order:
            count = max(1, tokens_per_batch // len(order[0]))
            part, order = order[:count], order[count:]
            ids = torch.zeros(len(part), len(part[0]), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, sequence in enumerate(part):
                ids[row, : len(sequence)] = torch.tensor(sequence)
                mask[row, : len(sequence)] = 1
            self.batches.append((ids, mask))

    def __call__(self) -> None:
        with torch.no_grad():
            for ids, mask in self.batches:
                self.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def seconds(self, rounds: int) -> float:
        self()
        return min(seconds(self) for _ in range(rounds))


def small_llama() -> Workload:
    """Random weights; the demo's tokenizer and text, cut to the lengths of summaries."""
    _, tokenizer = load_base("small")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
        )
    )
    return Workload(
        "Llama 256x4",
        with_trained_lora(model, "all-linear"),
        summaries(tokenizer, "small", 32),
        rounds=5,
    )


def demo() -> Workload:
    """The demo's model and a pool as the demo samples it: short prompts, three responses each."""
    base, tokenizer = load_base("small")
    settings = SETTINGS["small"]
    model = with_trained_lora(base, settings.lora["target_modules"])
    prompts = read_prompts("pool", max_words=settings.max_words)[:50]
    with model.disable_adapter():
        pool = generate_responses(
            model,
            tokenizer,
            prompts,
            num_generations=settings.num_generations,
            seed=0,
            show_progress=False,
            **settings.generation,
        )
    return Workload("demo", model, tokenize_pool(pool, tokenizer), rounds=5)


def smollm2() -> Workload:
    """SmolLM2-135M-Instruct on a small sample, with the demo's adapter."""
    base, tokenizer = load_base("smollm2")
    model = with_trained_lora(base, SETTINGS["smollm2"].lora["target_modules"])
    return Workload("SmolLM2-135M", model, summaries(tokenizer, "smollm2", 2), rounds=3)


def with_trained_lora(model: nn.Module, targets: str | list[str]) -> PeftModel:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    return peft_model.eval()


def summaries(
    tokenizer: transformers.PreTrainedTokenizerBase, name: str, prompts: int
) -> TokenizedPool:
    """Prompts of about 350 tokens with two responses of about 40 each, cut from real text."""
    generator = torch.Generator().manual_seed(0)
    text: list[int] = []
    sources = iter(read_prompts("train", name))

    def take(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        while len(text) < length:
            source = next(sources).prompt
            words = source if isinstance(source, str) else source[0]["content"]
            text.extend(tokenizer(words, add_special_tokens=False).input_ids)
        taken = text[:length]
        del text[:length]
        return taken

    sequences = []
    for _ in range(prompts):
        prompt = take(300, 400)
        sequences += [TokenizedResponse(prompt + take(30, 50), len(prompt)) for _ in range(2)]
    return TokenizedPool(sequences, [], [item for item in range(prompts) for _ in range(2)])


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "llama": small_llama,
    "demo": demo,
    "smollm2": smollm2,
}
