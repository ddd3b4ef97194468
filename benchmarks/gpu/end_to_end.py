"""The section "end_to_end" of `benchmarks.gpu`: gradient rows of whole models.

Random weights of known shapes, LoRA adapters as after some training (B is not zero), and pairs of
responses of summarization length. `FeatureExtractor` takes the rows as users' code does; the floor
is the same passes over the same batches in which nothing is captured.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.cases import Case, Found, Record, Settings, Skip
from benchmarks.gpu.timing import wall_seconds

if TYPE_CHECKING:
    from peft import PeftModel

# (method, ACTIVEDPO_DETERMINISTIC)
METHODS = (("sjlt", "0"), ("sjlt", "1"))
OTHERS = (("kronecker", "0"), ("rademacher", "0"))  # of models that say so
ROUNDS = 2
_MOST_KERNELS = 30  # of a profile, by time
_GIB = 2**30


@dataclass(frozen=True)
class Model:
    """A shape of Llama, its adapter, and the numbers of pairs and of tokens per batch.

    adapters: the dtype of the adapter's weights; PEFT makes them float32 unless told otherwise.
    gib: memory that it needs. others: whether the other sketches are measured too.
    """

    name: str
    config: dict[str, int]
    rank: int
    pairs: int
    batch: int
    gib: float
    expected: float
    adapters: str = "bfloat16"
    others: bool = False

    def methods(self) -> tuple[tuple[str, str], ...]:
        return METHODS + OTHERS if self.others else METHODS

    def title(self) -> str:
        return f"{self.name}, r = {self.rank}, {self.adapters} adapters"


SMALL = {
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32_000,
}
LARGE = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11_008,
    "vocab_size": 32_000,
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "vocab_size": 50,
}
# By importance: the last ones may be cut off when time runs out. PEFT makes adapters float32 unless
# told otherwise.
MODELS = (
    Model("Llama 7B", LARGE, 128, 24, 4_096, 60, 50, adapters="float32"),
    Model("Llama 7B", LARGE, 16, 24, 4_096, 60, 45, adapters="float32"),
    Model("Llama 7B", LARGE, 16, 24, 4_096, 60, 40),
    Model("Llama 1.1B", SMALL, 16, 64, 16_384, 45, 25, adapters="float32", others=True),
    Model("Llama 7B", LARGE, 128, 24, 4_096, 60, 45),
    Model("Llama 1.1B", SMALL, 128, 64, 16_384, 45, 30),
)
DRY = (Model("tiny", TINY, 4, 2, 512, 0, 1, others=True),)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def cases(settings: Settings) -> list[Case]:
    """One per model: the floor, the forward passes, and every sketch in the same rounds."""
    return [
        Case(
            model.title(),
            partial(_measure, model, settings),
            model.expected,
            4 * model.expected + 60,
        )
        for model in (DRY if settings.tiny else MODELS)
    ]


def _measure(model: Model, settings: Settings, found: Found) -> Record:
    import peft  # noqa: F401  (its absence is this case's reason)

    from activedpo_fast import FeatureExtractor, Sketch
    from activedpo_fast.gradients.batches import Layout
    from benchmarks.rows.floor import without_capture

    if settings.device == "cuda":
        free, total = (n / _GIB for n in torch.cuda.mem_get_info())
        if free < model.gib:
            raise Skip(f"needs about {model.gib:.0f} GiB; {free:.0f} of {total:.0f} are free")
    policy = build(model, settings.device)
    pool = pairs(model, settings.tiny)
    extractor = FeatureExtractor(policy, Sketch(), beta=1.0, max_tokens_per_batch=model.batch)
    started = time.perf_counter()
    shared = extractor.check(pool) is Layout.SHARED
    checked = time.perf_counter() - started

    def rows(method: str, deterministic: str) -> Tensor:
        extractor.sketch = Sketch(method, 64 if settings.tiny else 8192)
        with patch.dict(os.environ, {"ACTIVEDPO_DETERMINISTIC": deterministic}):
            return extractor.gradients(pool, show_progress=False).gradients

    ways: dict[str, Callable[[], Any]] = {
        "forward": lambda: extractor.logps(pool, show_progress=False),
        "floor": lambda: without_capture(lambda: rows(*METHODS[0])),
        **{title(*key): partial(rows, *key) for key in model.methods()},
    }
    times, peaks = _in_rounds(ways, settings)
    profiles = {
        name: _profiled_or_why(ways[name], settings) for name in ("floor", title(*METHODS[0]))
    }
    tokens = [len(s.input_ids) for s in pool.sequences]
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return {
        "model": model.name,
        "rank": model.rank,
        "adapters": model.adapters,
        "trainable": trained,
        "pairs": model.pairs,
        "batch_tokens": model.batch,
        "prompts_shared": shared,
        "response_tokens": statistics.mean(
            len(s.input_ids) - s.completion_start for s in pool.sequences
        ),
        "sequence_tokens": statistics.mean(tokens),
        "weights_gib": _weights(policy),
        "check_seconds": checked,
        "profiles": profiles,
        "ways": {name: {**_way(name, times, model), "peak_gib": peaks[name]} for name in ways},
    }


def title(method: str, deterministic: str) -> str:
    return method if deterministic == "0" else f"{method}, the same bits on every run"


def build(model: Model, device: str) -> PeftModel:
    """The model with its adapter, in bfloat16, initialized on the device."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            options: dict[str, Any] = {
                **model.config,
                "max_position_embeddings": 2048,
                "attn_implementation": "sdpa",
            }
            base = LlamaForCausalLM(LlamaConfig(**options))
            config = LoraConfig(
                r=model.rank,
                lora_alpha=2 * model.rank,
                target_modules=TARGETS,
                task_type="CAUSAL_LM",
            )
            policy = get_peft_model(
                base, config, autocast_adapter_dtype=model.adapters == "float32"
            )
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return policy.eval()


def pairs(model: Model, tiny: bool) -> Any:
    """Prompts of 300 to 400 tokens with two responses of 30 to 50, as TL;DR has them."""
    from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse

    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        vocabulary = model.config["vocab_size"]
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    prompt_lengths, lengths = ((4, 7), (2, 4)) if tiny else ((300, 400), (30, 50))
    sequences = []
    for _ in range(model.pairs):
        prompt = draw(*prompt_lengths)
        sequences += [TokenizedResponse(prompt + draw(*lengths), len(prompt)) for _ in range(2)]
    return TokenizedPool(sequences, [], [item for item in range(model.pairs) for _ in range(2)])


def _in_rounds(
    ways: dict[str, Callable[[], Any]], settings: Settings
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Seconds of every contender in every round, and peak memory in an earlier round, in which
    kernels are compiled."""
    peaks = {name: _peak(way, settings) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 if settings.tiny else ROUNDS):
        for name, way in ways.items():
            times[name].append(wall_seconds(way, settings.device))
    return times, peaks


def _profiled_or_why(run: Callable[[], Any], settings: Settings) -> Record | None:
    try:
        return profiled(run, settings)
    except Exception as error:  # a profile only explains the figures, which matter more
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def profiled(run: Callable[[], Any], settings: Settings) -> Record | None:
    """The GPU's time: kernels by name, launches, and how long nothing ran."""
    if settings.device != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, until = 0.0, -math.inf
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    by_name: dict[str, list[float]] = {}
    for event in kernels:
        by_name.setdefault(event.name[:80], []).append(event.time_range.elapsed_us())
    most = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:_MOST_KERNELS]
    return {
        "launches": len(kernels),
        "busy_seconds": busy / 1e6,
        "span_seconds": (until - spans[0][0]) / 1e6,
        "kernels": [
            {"name": name, "count": len(times), "seconds": sum(times) / 1e6} for name, times in most
        ],
    }


def _way(name: str, times: dict[str, list[float]], model: Model) -> Record:
    """Medians; ratios are of one round. The backward pass is the floor less the forward passes."""
    own, floors, forwards = times[name], times["floor"], times["forward"]
    seconds = statistics.median(own)
    record: Record = {
        "seconds": seconds,
        "pairs_a_second": model.pairs / seconds,
        "times_floor": statistics.median(t / f for t, f in zip(own, floors, strict=True)),
    }
    if name not in ("floor", "forward"):
        record["overhead_of_backward"] = statistics.median(
            (t - floor) / (floor - forward)
            for t, floor, forward in zip(own, floors, forwards, strict=True)
        )
    return record


def _peak(run: Callable[[], Any], settings: Settings) -> float | None:
    if settings.device != "cuda":
        run()
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / _GIB


def _weights(model: nn.Module) -> float:
    return sum(p.nbytes for p in model.parameters()) / _GIB
