"""The paper's settings: the first round of each file, on small models of the same architectures and
data with the same columns."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from activedpo_fast.cli.app import main
from tests.support.models import VOCAB_SIZE, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

PAPER = Path(__file__).parents[2] / "examples" / "paper"
ARCHITECTURES = {
    "meta-llama/Llama-2-7b-hf": "llama",
    "google/gemma-2b": "gemma",
    "Qwen/Qwen3-4B-Base": "qwen",
}

TLDR = [
    {
        "prompt": f"SUBREDDIT: r/advice\n\nTITLE: Fox {n}\n\nPOST: The dog.\n\nTL;DR:",
        "completion": " a fox",
    }
    for n in (0, 1, 2, 2)
]
WEBGPT = [
    {
        "question": {"dataset": "eli5", "id": str(n), "full_text": f"What is a sketch {n}? "},
        "quotes_0": {"title": ["a"], "extract": ["b"]},
        "answer_0": "A projection.",
        "tokens_0": {"prefix": [1], "completion": [2]},
        "score_0": 1.0,
        "quotes_1": {"title": ["a"], "extract": ["b"]},
        "answer_1": "No.",
        "tokens_1": {"prefix": [1], "completion": [2]},
        "score_1": -1.0,
    }
    for n in (0, 1, 2, 2)
]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("name", "rows", "first"),
    [
        ("tldr", TLDR, TLDR[0]["prompt"]),
        ("webgpt", WEBGPT, "Question: What is a sketch 0?\n\nAnswer:"),
    ],
)
def test_prompts_of_the_real_columns(
    tmp_path: Path,
    name: str,
    rows: list[dict[str, Any]],
    first: str,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = tmp_path / f"rows.{suffix}", tmp_path / "out" / "prompts.jsonl"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["prompts.py", name, str(output), "--source", str(source)])
    capsys.readouterr()
    runpy.run_path(str(PAPER / "prompts.py"), run_name="__main__")
    assert capsys.readouterr().out == f"3 prompts in {output}\n"
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written[0]["prompt"] == first
    assert len({row["id"] for row in written}) == 3


# Every model and every data set once.
QUICK = [PAPER / f"{name}.yaml" for name in ("gemma-2b-webgpt", "llama2-7b-tldr", "qwen3-4b-tldr")]


@pytest.mark.parametrize(
    "path", slow_except(QUICK, sorted(PAPER.glob("*.yaml"))), ids=lambda path: path.stem
)
def test_a_first_round(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = yaml.safe_load(path.read_text())
    model = tiny_causal_lm(ARCHITECTURES[given["model"]])
    reward = DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=256,
            num_labels=1,
            pad_token_id=1,
        )
    )
    for name, saved in (("model", model), ("reward", reward)):
        saved.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    rows = TLDR if path.stem.endswith("tldr") else WEBGPT
    (tmp_path / "prompts.jsonl").write_text(
        "".join(
            json.dumps(
                {"prompt": f"Prompt {n}: {row.get('prompt') or row['question']['full_text']}"}
            )
            + "\n"
            for n, row in enumerate(rows)
        )
    )
    # Changed because a small machine cannot run it. All other settings are those of the file.
    small: dict[str, dict[str, Any]] = {
        "loop": {"rounds": 1, "batch_size": 4, "prompts_per_round": 4, "max_completion_length": 4},
        "selection": {"proj_dim": 64},
        "dpo": {"num_train_epochs": 1, "bf16": False},
        "lora": {"r": 4, "lora_alpha": 16},
    }
    config = {
        **given,
        "model": str(tmp_path / "model"),
        "dtype": "float32",
        "device": "cpu",
        "prompts": str(tmp_path / "prompts.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "oracle": {**given["oracle"], "model": str(tmp_path / "reward")},
        **{name: {**given.get(name, {}), **values} for name, values in small.items()},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", str(tmp_path / "run.yaml"), "--quiet"]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "round-000" / "adapter" / "adapter_model.safetensors").exists()
    labels = (tmp_path / "run" / "round-000" / "labels.jsonl").read_text().splitlines()
    assert len(labels) == 4
