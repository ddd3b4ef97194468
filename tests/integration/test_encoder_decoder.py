"""Selection with encoder-decoder models: from memory, from folders, by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import nn

from activedpo_fast import (
    ActiveDPOError,
    ActiveDPOLoop,
    ActiveDPOSelector,
    PreferencePool,
    Prompt,
    generate_responses,
)
from activedpo_fast.cli.app import main
from activedpo_fast.labels import CallableOracle
from activedpo_fast.models.loading import load_model, load_policy
from activedpo_fast.selection.signals import TensorSignals
from activedpo_fast.selection.strategies import STRATEGIES, make_strategy
from activedpo_fast.store.store import FeatureStore
from activedpo_fast.training.trl import dpo_config, train_dpo
from tests.support.encoder_decoder import loop_rows, tiny_model, with_lora
from tests.support.gradients import relative_error, trainable
from tests.support.models import tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"id": f"p{n}", "prompt": prompt, "responses": responses}
    for n, (prompt, responses) in enumerate(
        [
            ("What is a sketch?", [" a short projection", " no idea", " x"]),
            ("Name the library.", [" this one", " the quick brown fox"]),
            ("label or prefer:", [" people prefer one", " dog", " respond, align a model"]),
            ("0123", [" 4567", " lazy"]),
        ]
    )
]
POOL = PreferencePool.from_rows(ROWS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, adapter/ and pool.jsonl. Tests must not change it."""
    path = tmp_path_factory.mktemp("t5")
    tiny_model("t5", torch.float32).save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(path / "model")
    with_lora(base, "t5").save_pretrained(str(path / "adapter"))
    (path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def by_the_loop(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    ids, eos = tiny_tokenizer().encode, tiny_tokenizer().eos_token_id
    texts = [(ids(item.prompt), [*ids(str(r)), eos]) for item in POOL for r in item.responses]
    return loop_rows(model, texts, trainable(model))


def test_every_strategy_picks_by_the_loops_numbers() -> None:
    model = with_lora(tiny_model("bart"), "bart")
    gradients, logps = by_the_loop(model)
    _, ref_logps = by_the_loop(tiny_model("bart"))
    beta = 0.1
    selector = ActiveDPOSelector(model, tiny_tokenizer(), sketch="none", beta=beta)
    hidden = selector.extractor.hidden(selector.tokenize(POOL))  # tests/gradients compares them
    signals = TensorSignals(
        POOL.pairs(),
        torch.tensor([n for n, item in enumerate(POOL) for _ in item.responses]),
        gradients=beta * gradients,
        logps=logps,
        ref_logps=ref_logps,
        hidden=hidden,
    )
    for name in STRATEGIES.keys() - {"random", "reward_gap"}:
        selector = ActiveDPOSelector(
            model, tiny_tokenizer(), sketch="none", beta=beta, strategy=name, verify=False
        )
        picked = selector.select(POOL, 3)
        options = {"beta": beta} if "beta" in STRATEGIES[name].options() else {}
        expected = make_strategy(name, **options).select(signals, 3)
        pairs = POOL.pairs()[expected.indices]
        offsets = POOL.response_offsets
        found = [[int(offsets[POOL.ids.index(pick.id)]) + n for n in pick.pair] for pick in picked]
        assert found == pairs.tolist(), name
        scores = torch.tensor([pick.score for pick in picked], dtype=torch.float64)
        torch.testing.assert_close(scores, expected.scores.double(), rtol=1e-5, atol=1e-7)


def test_labeled_pairs_and_two_stages() -> None:
    model = with_lora(tiny_model("t5", torch.float32), "t5")
    selector = ActiveDPOSelector(model, tiny_tokenizer(), proj_dim=64, preselect=2)
    first = selector.select(POOL, 2)
    later = selector.select(POOL, 3, labeled=first)
    assert len(first) == 2 and len(later) == 3
    assert not {(p.id, p.pair) for p in first} & {(p.id, p.pair) for p in later}


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    store, picks = tmp_path / "store", tmp_path / "picks.jsonl"
    paths = ["--model", str(folder / "model"), "--adapter", str(folder / "adapter")]
    argv = ["features", str(folder / "pool.jsonl"), *paths, "--output", str(store)]
    assert main([*argv, "--sketch", "none", "--beta", "0.3", "--threads", "1"]) == 0
    model, _ = load_policy(folder / "model", adapter=folder / "adapter", dtype="float64")
    expected, logps = by_the_loop(model)
    rows = FeatureStore.open(store).load()
    assert relative_error(rows.gradients, 0.3 * expected) < 1e-4
    torch.testing.assert_close(rows.logps, logps, rtol=1e-5, atol=0)

    assert main(["select", str(store), "--pairs", "4", "--output", str(picks)]) == 0
    lines = [json.loads(line) for line in picks.read_text().splitlines()]
    selector = ActiveDPOSelector(str(folder / "adapter"), sketch="none", beta=0.3)
    picked = selector.select(POOL, 4)
    assert [(line["id"], tuple(line["pair"])) for line in lines] == [
        (pick.id, pick.pair) for pick in picked
    ]


def test_loading(folder: Path) -> None:
    alone, _ = load_model(folder / "model")
    assert type(alone).__name__ == "T5ForConditionalGeneration"
    fresh, tokenizer = load_policy(folder / "model", lora={"r": 2, "target_modules": ["q"]})
    assert type(fresh).__name__ == "PeftModelForSeq2SeqLM"
    assert len(ActiveDPOSelector(fresh, tokenizer, proj_dim=16).select(POOL, 2)) == 2
    selector = ActiveDPOSelector(alone, tokenizer, peft_config=LoraConfig(target_modules=["v"]))
    assert isinstance(selector.model, PeftModel)


def test_rounds_are_refused(tmp_path: Path) -> None:
    model = with_lora(tiny_model("bart", torch.float32), "bart")
    prompts = [Prompt("a", "The quick")]
    oracle = CallableOracle(lambda prompt, a, b: 0)
    data = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    config = dpo_config(output_dir=str(tmp_path / "trainer"))
    for call in (
        lambda: train_dpo(model, tiny_tokenizer(), data, config, reference="round"),
        lambda: ActiveDPOLoop(
            model, tiny_tokenizer(), prompts, oracle, output_dir=str(tmp_path / "run")
        ),
        lambda: generate_responses(model, tiny_tokenizer(), prompts),
    ):
        with pytest.raises(ActiveDPOError, match="an encoder-decoder model, .* select with") as e:
            call()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()
