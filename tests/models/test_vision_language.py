"""Folders of vision-language models, loaded for pairs of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from activedpo_fast import ActiveDPOError, FeatureExtractor, PreferencePool, Sketch
from activedpo_fast.cli.app import main
from activedpo_fast.gradients.batches import Layout
from activedpo_fast.models.loading import load_policy
from activedpo_fast.models.named import as_model
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from activedpo_fast.store.store import FeatureStore
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import TINY_SIZES, tiny_tokenizer

ROWS = [
    {
        "prompt": "What is a sketch? TL;DR:",
        "responses": [" a short random projection", " a drawing"],
    },
    {"prompt": "Name the library. TL;DR:", "responses": [" this one", " the quick brown fox"]},
]
EXACT = Sketch("none")

_TOWER: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
_QWEN = dict(
    image_token_id=380, video_token_id=381, vision_start_token_id=382, vision_end_token_id=383
)
# model type -> its config
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": dict(
        _QWEN,
        text_config=dict(
            TINY_SIZES,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
        ),
        vision_config=dict(
            depth=1,
            hidden_size=16,
            intermediate_size=16,
            num_heads=2,
            out_hidden_size=32,
            fullatt_block_indexes=[0],
        ),
    ),
    "gemma3": dict(
        text_config=dict(
            TINY_SIZES,
            head_dim=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=_TOWER,
        image_token_index=383,
        mm_tokens_per_image=4,
    ),
    "smolvlm": dict(
        text_config=dict(TINY_SIZES, model_type="llama"), vision_config=_TOWER, image_token_id=383
    ),
}


def a_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **MODELS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
    return model.eval()


def saved(folder: Path, kind: str) -> tuple[Path, Path]:
    """The folders of the model, with a tokenizer, and of an adapter of its language part."""
    a_model(kind).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    base = AutoModelForImageTextToText.from_pretrained(folder / "model")
    config = LoraConfig(r=4, target_modules=r".*(text_model|language_model).*(q|v|down)_proj")
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(str(folder / "adapter"))
    return folder / "model", folder / "adapter"


def tokens() -> TokenizedPool:
    return tokenize_pool(PreferencePool.from_rows(ROWS), tiny_tokenizer(), max_length=None)


def assert_exact(model: PeftModel) -> None:
    expected, _ = loop_gradients(model, tokens().sequences, trainable(model))
    extractor = FeatureExtractor(model, EXACT, beta=1.0)
    assert extractor.check(tokens()) is Layout.SHARED
    assert relative_error(extractor.gradients(tokens()).gradients, expected) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_of_the_language_part(tmp_path: Path, kind: str) -> None:
    base, adapter = saved(tmp_path, kind)
    model, tokenizer = load_policy(base, adapter=adapter)
    assert type(model.get_base_model()) is type(a_model(kind))
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    names = [name for name, parameter in trainable(model).items() if parameter.any()]
    assert len(names) == 12 and all("text" in name or "language" in name for name in names)
    assert_exact(model)


def test_a_fresh_adapter_on_both_parts(tmp_path: Path) -> None:
    """Layers of the vision tower take no part in texts: their gradients are zero."""
    base, _ = saved(tmp_path, "smolvlm")
    model, _ = load_policy(base, lora={"r": 4, "target_modules": ["q_proj"]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    assert any("vision" in name for name in trainable(model))
    assert_exact(model)


def test_by_name_and_by_the_command(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, "qwen2_5_vl")
    model, _ = as_model(adapter, tiny_tokenizer())
    assert type(model.get_base_model()).__name__ == "Qwen2_5_VLForConditionalGeneration"
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps({"id": str(n), **row}) + "\n" for n, row in enumerate(ROWS)))
    arguments = ["--model", base, "--adapter", adapter, "--output", tmp_path / "store"]
    assert main(["features", str(pool), *map(str, arguments), "--proj-dim", "64"]) == 0
    rows = FeatureStore.open(tmp_path / "store").load().gradients
    expected = FeatureExtractor(model, Sketch("sjlt", 64)).gradients(tokens()).gradients
    assert relative_error(rows, expected) < 1e-5


# As of LLaVA and SmolVLM: the parts of a content that are texts.
_PARTS_ALONE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)


def test_the_template_of_an_earlier_processor(tmp_path: Path) -> None:
    base, adapter = saved(tmp_path, "smolvlm")
    file = base / "chat_template.json"
    file.write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    _, tokenizer = load_policy(base, adapter=adapter)
    chat = [{"role": "user", "content": "What is a sketch?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "What is a sketch?"


def test_a_template_that_leaves_out_strings() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    chats = PreferencePool.from_rows(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "responses": [[{"role": "assistant", "content": r}] for r in row["responses"]],
            }
            for row in ROWS
        ]
    )
    assert len(tokenize_pool(chats, tokenizer).sequences) == 4
    tokenizer.chat_template = _PARTS_ALONE
    with pytest.raises(ActiveDPOError, match="leaves out contents that are strings") as error:
        tokenize_pool(chats, tokenizer)
    assert "\n" not in str(error.value)
