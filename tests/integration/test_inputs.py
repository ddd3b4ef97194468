"""Names instead of models, and data sets instead of pools, give the same results as the objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from activedpo_fast import (
    ActiveDPOError,
    ActiveDPOLoop,
    ActiveDPOSelector,
    FeatureExtractor,
    FeatureStore,
    PreferencePool,
    Prompt,
    Sketch,
    generate_responses,
)
from activedpo_fast.labels import CallableOracle, RewardModelOracle, RewardOracle
from activedpo_fast.models.loading import load_policy
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.training.generation import respond
from activedpo_fast.training.trl import dpo_config
from tests.support.models import VOCAB_SIZE, lora, saved_model, tiny_causal_lm, tiny_tokenizer

WORDS = "library prompt model sketch label pair fox dog random choose".split()
ROWS = [
    {"prompt": f"The {word}", "responses": [f" {word}", " fox and dog", f" {n}"], "topic": word}
    for n, word in enumerate(WORDS)
]
PROMPTS = [{"id": f"p{n}", "prompt": f"The {word}"} for n, word in enumerate(WORDS)]


@pytest.fixture(scope="module")
def base_and_adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def adapter(base_and_adapter: tuple[Path, Path]) -> str:
    return str(base_and_adapter[1])


@pytest.fixture(scope="module")
def loaded(base_and_adapter: tuple[Path, Path]) -> tuple[Any, Any]:
    base, adapter = base_and_adapter
    return load_policy(base, adapter=adapter)


@pytest.mark.parametrize("strategy", ["activedpo", "apo", "margin_small", "random"])
def test_select_by_name_from_a_data_set(strategy: str, adapter: str, loaded) -> None:
    pool, dataset = PreferencePool.from_rows(ROWS), Dataset.from_list(ROWS)
    expected = ActiveDPOSelector(*loaded, strategy=strategy).select(pool, 6)
    named = ActiveDPOSelector(adapter, strategy=strategy)
    picked = named.select(dataset, 6)
    assert picked == expected
    again = ActiveDPOSelector(*loaded, strategy=strategy).select(pool, 3, labeled=expected)
    assert named.select(dataset, 3, labeled=picked) == again
    # The model that the selector loaded is trained next.
    assert any(parameter.requires_grad for parameter in named.model.parameters())
    assert named.processing_class.get_vocab() == loaded[1].get_vocab()


def test_a_base_model_by_name_has_no_gradients(base_and_adapter: tuple[Path, Path]) -> None:
    base = str(base_and_adapter[0])
    dataset = Dataset.from_list(ROWS)
    assert len(ActiveDPOSelector(base, strategy="apo").select(dataset, 3)) == 3
    for strategy in ("activedpo", "trace"):
        with pytest.raises(ActiveDPOError, match="no trainable parameter .*peft.get_peft_model"):
            ActiveDPOSelector(base, strategy=strategy)
    # The same message as for a model in memory, which may still get an adapter.
    frozen = tiny_causal_lm("llama").requires_grad_(False)
    with pytest.raises(ActiveDPOError, match="no trainable parameter .*peft.get_peft_model"):
        ActiveDPOSelector(frozen, tiny_tokenizer()).select(dataset, 3)
    with pytest.raises(ActiveDPOError, match="rounds train an adapter, which .*model does not"):
        ActiveDPOLoop(
            base,
            None,
            Dataset.from_list(PROMPTS),
            CallableOracle(lambda *_: 0),
            output_dir="unused",
            dpo_args=dpo_config(output_dir="unused"),
        )


def test_names_that_lead_nowhere(adapter: str) -> None:
    with pytest.raises(ActiveDPOError, match="nowhere/at/all: no such model folder"):
        ActiveDPOSelector("nowhere/at/all")
    with pytest.raises(ActiveDPOError, match="strategy"):  # before a model is loaded
        ActiveDPOSelector("nowhere/at/all", strategy="best")
    with pytest.raises(ActiveDPOError, match="processing_class: pass the model's tokenizer"):
        ActiveDPOSelector(lora(tiny_causal_lm("llama"), "llama"))
    with pytest.raises(ActiveDPOError, match="ref_model: the model has no adapter called"):
        ActiveDPOSelector(adapter, ref_model="me/reference")


def test_the_parts_take_the_same(adapter: str, loaded, tmp_path: Path) -> None:
    model, tokenizer = loaded
    pool, dataset = PreferencePool.from_rows(ROWS), Dataset.from_list(ROWS)
    tokens = tokenize_pool(dataset, tokenizer)
    assert tokens == tokenize_pool(pool, tokenizer)
    by_name = FeatureExtractor(adapter, Sketch("sjlt", 32)).gradients(tokens)
    expected = FeatureExtractor(model, Sketch("sjlt", 32)).gradients(tokens)
    assert torch.equal(by_name.gradients, expected.gradients)

    FeatureStore.create(tmp_path / "store", dataset, {}, skipped=[])
    assert list(FeatureStore.create(tmp_path / "store", pool, {}, skipped=[]).pool()) == list(pool)

    def reward(
        prompts: Any, responses: Sequence[Any], extras: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        return [
            float(len(extra["topic"] + response))
            for extra, response in zip(extras, responses, strict=True)
        ]

    picked = ActiveDPOSelector(model, tokenizer, strategy="random").select(pool, 8)
    oracle = RewardOracle(reward, temperature=0)
    assert oracle.label(picked, dataset) == oracle.label(picked, pool)


def test_responses_by_name_to_a_data_set(adapter: str, loaded) -> None:
    prompts = [Prompt(row["id"], row["prompt"]) for row in PROMPTS[:4]]
    dataset = Dataset.from_list(PROMPTS[:4])
    options: dict[str, Any] = dict(max_completion_length=4, seed=3, show_progress=False)
    pool = generate_responses(adapter, None, dataset, **options)
    assert list(pool) == list(generate_responses(*loaded, prompts, **options))
    assert respond(adapter, None, dataset, **options) == respond(*loaded, prompts, **options)
    with pytest.raises(ActiveDPOError, match="row 1: the column 'responses': a prompt has no"):
        generate_responses(*loaded, Dataset.from_list(ROWS), **options)
    with pytest.raises(ActiveDPOError, match="prompts: expected Prompts, .*, got int"):
        generate_responses(*loaded, 3, **options)


def test_a_reward_model_by_name(tmp_path: Path, loaded) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
            pad_token_id=1,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    picked = ActiveDPOSelector(*loaded, strategy="random").select(PreferencePool.from_rows(ROWS), 8)
    expected = RewardModelOracle(model, tiny_tokenizer(), temperature=0).label(picked)
    assert {0, 1} <= set(expected)
    assert RewardModelOracle(tmp_path, temperature=0).label(picked) == expected
    assert (
        RewardModelOracle(str(tmp_path), tiny_tokenizer(), temperature=0).label(picked) == expected
    )
    with pytest.raises(ActiveDPOError, match="tokenizer: pass the reward model's"):
        RewardModelOracle(model)


def test_a_loop_by_name_over_a_data_set(adapter: str, base_and_adapter, tmp_path: Path) -> None:
    prompts = [Prompt(row["id"], row["prompt"]) for row in PROMPTS]
    # Training changes the model, so it is not the one of the other tests.
    runs = {
        "objects": (*load_policy(base_and_adapter[0], adapter=adapter), prompts),
        "names": (adapter, None, Dataset.from_list(PROMPTS)),
    }
    for folder, given in runs.items():
        loop = ActiveDPOLoop(
            *given,
            CallableOracle(lambda prompt, a, b: int(a < b)),
            output_dir=tmp_path / folder,
            dpo_args=dpo_config(
                output_dir=str(tmp_path / "trainer"),
                learning_rate=1e-2,
                max_steps=2,
                per_device_train_batch_size=3,
            ),
            selector_options={"proj_dim": 64, "verify": False},
            batch_size=3,
            rounds=1,
            prompts_per_round=4,
            num_generations=2,
            max_completion_length=4,
            show_progress=False,
        )
        assert len(loop.run()) == 2
    for name in (
        "config.json",
        "round-000/pool.jsonl",
        "round-000/picked.jsonl",
        "round-000/labels.jsonl",
        "round-000/adapter/adapter_model.safetensors",
    ):
        assert (tmp_path / "names" / name).read_bytes() == (
            tmp_path / "objects" / name
        ).read_bytes(), name
    # The adapter of a round can be given by name too, with its tokenizer in the same folder.
    trained = ActiveDPOSelector(tmp_path / "names" / "round-000" / "adapter")
    assert len(trained.select(Dataset.from_list(ROWS), 2)) == 2


def test_a_model_without_an_adapter_is_named_in_the_log(caplog) -> None:
    """A trainer with a peft_config trains other parameters."""
    caplog.set_level("INFO", logger="activedpo_fast")
    model = tiny_causal_lm("llama")
    ActiveDPOSelector(lora(tiny_causal_lm("llama"), "llama"), tiny_tokenizer())
    assert "no adapter" not in caplog.text
    ActiveDPOSelector(model, tiny_tokenizer())
    assert "the model has no adapter: rows are gradients of all that it trains" in caplog.text
