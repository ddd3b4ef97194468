"""Every public name has an example in its docstring, and the examples run as they are written."""

from __future__ import annotations

import doctest
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import activedpo_fast
from activedpo_fast import ActiveDPOLoop, ActiveDPOSelector, PreferencePool, Prompt
from activedpo_fast.labels import CallableOracle
from activedpo_fast.training.trl import dpo_config
from tests.support.generation_server import GenerationServer
from tests.support.label_studio import LEGACY, LabelStudio
from tests.support.models import VOCAB_SIZE, lora, saved_model, tiny_causal_lm, tiny_tokenizer
from tests.support.servers import prefers_longer, serving

pytest.importorskip("trl")

API = Path(__file__).parents[2] / "docs" / "api.md"

ROWS = [
    {
        "id": "sky",
        "topic": "science",
        "prompt": "Why is the sky blue?",
        "responses": [
            " Air scatters blue light more than red light.",
            " It mirrors the sea.",
            " No idea.",
        ],
    },
    {
        "id": "tides",
        "topic": "science",
        "prompt": "What causes the tides?",
        "responses": [" The pull of the moon and of the sun.", " Mostly the wind."],
    },
    {
        "id": "rice",
        "topic": "cooking",
        "prompt": "How long does rice take to cook?",
        "responses": [
            " White rice takes about fifteen minutes.",
            " It depends.",
            " Two hours at least.",
        ],
    },
    {
        "id": "egg",
        "topic": "cooking",
        "prompt": "How do I boil an egg?",
        "responses": [" Put it into boiling water for eight minutes.", " Ask a chef."],
    },
]
LABELS = [0, 1, None, 0]


def _public() -> dict[str, Any]:
    """The public names of the package and of the API page, with their objects."""
    found = {
        name: getattr(activedpo_fast, name)
        for name in activedpo_fast.__all__
        if name != "__version__"
    }
    for module, name in re.findall(r"^::: ([\w.]+)\.(\w+)$", API.read_text(), re.MULTILINE):
        found[name] = getattr(import_module(module), name)
    return found


PUBLIC = _public()


@pytest.fixture(scope="module")
def judge_url() -> Iterator[str]:
    with serving(prefers_longer) as server:
        yield f"{server.address}/v1"


@pytest.fixture(scope="module")
def vllm_url() -> Iterator[str]:
    with serving(GenerationServer(tiny_causal_lm("llama"), tiny_tokenizer())) as server:
        yield f"{server.address}/v1"


@pytest.fixture(scope="module")
def label_studio_url() -> Iterator[str]:
    with serving(LabelStudio()) as server:
        yield server.address


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory, judge_url: str, label_studio_url: str, vllm_url: str
) -> dict[str, Any]:
    """The objects that examples use, as listed on the API page; made once."""
    model, tokenizer = lora(tiny_causal_lm("llama"), "llama"), tiny_tokenizer()
    torch.manual_seed(0)
    reward_model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pool = PreferencePool.from_rows(ROWS)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "pool": pool,
        "reward_model": reward_model,
        "reward_tokenizer": tokenizer,
        "prompts": [Prompt(item.id, item.prompt) for item in pool],
        "picked": ActiveDPOSelector(model, tokenizer).select(pool, len(LABELS)),
        "labels": LABELS,
        "dpo_args": dpo_config(output_dir="trainer", max_steps=1),
        "judge_url": judge_url,
        "label_studio_url": label_studio_url,
        "vllm_url": vllm_url,
        "adapter": saved_model(tmp_path_factory.mktemp("models"))[1],
    }


def _docstrings(name: str) -> list[doctest.DocTest]:
    """The examples of a public name and of its methods."""
    return doctest.DocTestFinder().find(PUBLIC[name], name, globs={})


@pytest.fixture
def namespace(
    name: str, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """A copy for one example, in a folder with an adapter and partly labeled picks; a selector and
    a loop if it uses them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABEL_STUDIO_TOKEN", LEGACY)
    Path("adapter").symlink_to(parts["adapter"])
    names = {**parts, "model": deepcopy(parts["model"]), "labels": list(LABELS)}
    model, tokenizer, picked = names["model"], names["tokenizer"], names["picked"]
    used = "".join(example.source for found in _docstrings(name) for example in found.examples)
    if "selector" in used:
        names["selector"] = ActiveDPOSelector(model, tokenizer)
    if "loop" in used:
        names["loop"] = ActiveDPOLoop(
            model,
            tokenizer,
            names["prompts"],
            CallableOracle(lambda prompt, a, b: int(a < b)),
            output_dir="loop",
            dpo_args=names["dpo_args"],
            rounds=1,
            batch_size=2,
            max_completion_length=8,
        )
    picked.to_jsonl("to_label.jsonl")
    lines = [json.loads(line) for line in Path("to_label.jsonl").read_text().splitlines()]
    for line, label in zip(lines, (0, 1, "skip"), strict=False):
        line["label"] = label
    Path("to_label.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return names


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run_as_written(name: str, namespace: dict[str, Any]) -> None:
    docstrings = _docstrings(name)
    assert any(found.name == name and found.examples for found in docstrings), (
        f"the docstring of {name} has no example"
    )
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for found in docstrings:
        found.globs.update(namespace)
        runner.run(found, out=said.append)
    if runner.failures:
        pytest.fail("".join(said), pytrace=False)
