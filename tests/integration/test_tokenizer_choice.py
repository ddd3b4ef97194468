"""The tokenizer of an adapter: the one that training saved with it, or the one given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from activedpo_fast.cli.app import main
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.loading import load_policy
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selector import ActiveDPOSelector
from tests.support.models import VOCAB_SIZE, lora, tiny_causal_lm, tiny_tokenizer

ROWS = [
    {"id": f"p{n}", "prompt": f"label {n}?", "responses": [f" fox {n}", " dog"]} for n in range(4)
]
CHATS = [
    {
        "id": row["id"],
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "responses": [[{"role": "assistant", "content": text}] for text in row["responses"]],
    }
    for row in ROWS
]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """model/ with a plain tokenizer; adapter/ with a chat tokenizer that has another EOS."""
    base = tiny_causal_lm("llama")
    base.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lora(base, "llama").save_pretrained(str(tmp_path / "adapter"))
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "adapter")
    _write(tmp_path / "pool.jsonl", ROWS)
    _write(tmp_path / "chats.jsonl", CHATS)
    return tmp_path


def _features(project: Path, output: str, *more: str, pool: str = "pool.jsonl") -> list[str]:
    return [
        "features",
        str(project / pool),
        f"--model={project / 'model'}",
        f"--adapter={project / 'adapter'}",
        f"--output={project / output}",
        "--sketch=none",
        "--device=cpu",
        f"--export={project / output}.safetensors",
        *more,
    ]


def _rows(project: Path, tokenizer: Any, pool: str = "pool.jsonl") -> torch.Tensor:
    """The rows with this tokenizer, without the command line."""
    model, _ = load_policy(project / "model", adapter=project / "adapter", device="cpu")
    selector = ActiveDPOSelector(model, tokenizer, sketch="none")
    tokenized = selector.tokenize(PreferencePool.load(project / pool), show_progress=False)
    return selector.extractor.gradients(tokenized, show_progress=False).gradients


def test_the_tokenizer_saved_with_the_adapter_is_used_and_logged(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_features(project, "store")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "tokenizer" in line]
    assert len(said) == 1 and f"that of the adapter, {project / 'adapter'}" in said[0]
    found = load_file(project / "store.safetensors")["features"]
    right, wrong = _rows(project, tiny_tokenizer(chat=True)), _rows(project, tiny_tokenizer())
    torch.testing.assert_close(found, right)
    cosines = torch.cosine_similarity(right, wrong)
    assert float(cosines.min()) < 0.99  # it matters
    settings = json.loads((project / "store" / "manifest.json").read_text())["settings"]
    assert settings["tokenizer"] == str((project / "adapter").resolve())

    assert main(_features(project, "chats", pool="chats.jsonl")) == 0  # it has the chat template
    torch.testing.assert_close(
        load_file(project / "chats.safetensors")["features"],
        _rows(project, tiny_tokenizer(chat=True), "chats.jsonl"),
    )


def test_another_tokenizer_can_be_given(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_features(project, "store", f"--tokenizer={project / 'model'}")) == 0
    assert "tokenizer: that of" not in capsys.readouterr().err
    torch.testing.assert_close(
        load_file(project / "store.safetensors")["features"], _rows(project, tiny_tokenizer())
    )
    assert main(_features(project, "store")) == 2
    assert "made with another tokenizer (" in capsys.readouterr().err
    assert main(_features(project, "no", f"--tokenizer={project / 'nowhere' / 'at' / 'all'}")) == 2
    assert "no such tokenizer folder" in capsys.readouterr().err
    (project / "empty").mkdir()
    assert main(_features(project, "no", f"--tokenizer={project / 'empty'}")) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    assert not (project / "no").exists()


def test_tokenizer_files_are_settings_of_a_store(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_features(project, "store")) == 0
    template = project / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "model"))
    assert main(_features(project, "store")) == 2
    assert "made with another tokenizer (" in capsys.readouterr().err


def test_a_template_alone_is_not_a_tokenizer(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (project / "adapter").glob("tokenizer*"):
        path.unlink()
    assert main(_features(project, "store", pool="chats.jsonl")) == 2
    assert "has a chat_template.jinja but no tokenizer" in capsys.readouterr().err


def test_a_run_uses_the_same_tokenizer_and_saves_it_with_its_adapters(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(project / "prompts.jsonl", [{"id": r["id"], "prompt": r["prompt"]} for r in CHATS])
    (project / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "model": str(project / "model"),
                "adapter": str(project / "adapter"),
                "device": "cpu",
                "prompts": str(project / "prompts.jsonl"),
                "output_dir": str(project / "run"),
                "selection": {"proj_dim": 32, "verify": False},
                "loop": {
                    "max_completion_length": 4,
                    "rounds": 1,
                    "batch_size": 2,
                    "prompts_per_round": 3,
                    "num_generations": 2,
                },
                "dpo": {"max_steps": 1},
                "oracle": {"kind": "people", "via": "files"},
            }
        )
    )
    assert main(["run", str(project / "run.yaml")]) == 3  # "no chat template" with the model's
    shutil.rmtree(project / "adapter")
    shutil.copytree(project / "run" / "start" / "adapter", project / "adapter")
    assert main(_features(project, "store", pool="chats.jsonl")) == 0
    torch.testing.assert_close(
        load_file(project / "store.safetensors")["features"],
        _rows(project, tiny_tokenizer(chat=True), "chats.jsonl"),
    )


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(project / "adapter")
    assert len(tokenizer) == VOCAB_SIZE + 1
    assert main(_features(project, "store")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"'<|tool|>' has the id {VOCAB_SIZE}, the embedding {VOCAB_SIZE} rows" in error
    assert not (project / "store").exists()
    # A model whose own tokenizer has more tokens (for images, say) is accepted: texts do not use
    # them.
    tokenizer.save_pretrained(project / "model")
    assert main(_features(project, "store")) == 0
    # The one that ends every text is used.
    tokenizer.eos_token = "<|tool|>"
    tokenizer.save_pretrained(project / "model")
    with pytest.raises(ActiveDPOError, match=r"'<\|tool\|>' has the id"):
        load_policy(project / "model", lora={"target_modules": ["q_proj"]}, device="cpu")


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_a_resized_adapter_is_told_what_to_do(
    project: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_tokens(["<|tool|>"])
    base = tiny_causal_lm("llama")
    base.resize_token_embeddings(VOCAB_SIZE + 1)
    shutil.rmtree(project / "adapter")
    policy = lora(base, "llama", **config)
    policy.save_pretrained(str(project / "adapter"), save_embedding_layers=True)
    tokenizer.save_pretrained(project / "adapter")
    assert main(_features(project, "store")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was trained with a resized embedding" in error
    assert f"resize_token_embeddings({VOCAB_SIZE + 1})" in error
    if not config:
        # The advice works.
        resized = tiny_causal_lm("llama")
        resized.resize_token_embeddings(VOCAB_SIZE + 1)
        resized.save_pretrained(project / "model")
        assert main(_features(project, "store")) == 0


def test_other_shapes_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(project / "adapter")
    lora(tiny_causal_lm("llama", hidden_size=64), "llama").save_pretrained(str(project / "adapter"))
    assert main(_features(project, "store")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "does not fit the model: size mismatch for" in error and "lora_A" in error
