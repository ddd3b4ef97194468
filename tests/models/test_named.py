"""Models given by name: what is loaded, with which tokenizer, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.loading import load_policy
from activedpo_fast.models.named import as_model
from tests.support.models import lora, saved_model, tiny_causal_lm, tiny_tokenizer

# The hub's cache: a folder for each repository, with a folder for each commit.
_COMMITS = {"main": "a" * 40, "old": "b" * 40}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return saved_model(tmp_path)


def _edit(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _cached(cache: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Copy a folder to where a download of the repository would have put it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(_COMMITS[revision])
    shutil.copytree(folder, repository / "snapshots" / _COMMITS[revision])


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = _weights(one), _weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [str, Path])
def test_an_adapter_is_loaded_on_the_base_that_it_names(kind: type, folders) -> None:
    base, adapter = folders
    model, tokenizer = as_model(kind(adapter))
    expected, _ = load_policy(base, adapter=adapter)
    assert isinstance(model, PeftModel) and not model.training and _same(model, expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab() and not tokenizer.chat_template
    tiny_tokenizer(chat=True).save_pretrained(adapter)  # as training tools leave it there
    assert as_model(kind(adapter))[1].chat_template


def test_a_base_model_is_frozen(folders) -> None:
    model, tokenizer = as_model(str(folders[0]))
    assert not isinstance(model, PeftModel) and _same(model, tiny_causal_lm("llama"))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.eos_token == tiny_tokenizer().eos_token


def test_a_tokenizer_in_memory_is_used_as_it_is(folders) -> None:
    for folder in folders:
        for path in folder.glob("tokenizer*"):
            path.unlink()
        given = tiny_tokenizer(chat=True)
        assert as_model(folder, given)[1] is given
        with pytest.raises(ActiveDPOError, match="has no tokenizer that can be loaded"):
            as_model(folder)


def test_gradients_can_be_taken_of_a_model_loaded_in_inference_mode(folders) -> None:
    with torch.inference_mode():
        model, _ = as_model(folders[1])
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_objects_are_returned_as_they_are() -> None:
    model, tokenizer = lora(tiny_causal_lm("llama"), "llama"), tiny_tokenizer()
    found = as_model(model, tokenizer)
    assert found[0] is model and found[1] is tokenizer
    with pytest.raises(ActiveDPOError, match="processing_class: pass the model's tokenizer"):
        as_model(model)
    with pytest.raises(ActiveDPOError, match="processing_class: expected a tokenizer.* got str"):
        as_model(model, "a name")
    with pytest.raises(ActiveDPOError, match="model: expected a model or its name, got Tok"):
        as_model(tokenizer, model)


def test_names_on_the_hub(tmp_path: Path, folders, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = folders
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tiny_causal_lm("llama", seed=5).save_pretrained(other)
    _cached(cache, "me/base", other)
    _cached(cache, "me/base", base, "old")
    assert _same(as_model("me/base")[0], tiny_causal_lm("llama", seed=5))

    _edit(adapter, base_model_name_or_path="me/base")
    _cached(cache, "me/adapter", adapter)
    assert _same(as_model("me/adapter")[0], load_policy(other, adapter=adapter)[0])
    _edit(adapter, revision="old")
    assert _same(as_model(adapter)[0], load_policy(base, adapter=adapter)[0])
    _edit(adapter, revision="gone")
    with pytest.raises(ActiveDPOError, match="the base model of adapter .*: me/base: no such"):
        as_model(adapter)


def test_names_that_cannot_be_loaded_are_named(tmp_path: Path, folders) -> None:
    base, adapter = folders
    cases = [
        ("nowhere/at/all", "nowhere/at/all: no such model folder"),
        (tmp_path / "gone", "gone: no such model folder"),
        (tmp_path, "is not a model folder: no config.json in it"),
    ]
    for name, message in cases:
        with pytest.raises(ActiveDPOError, match=message) as caught:
            as_model(name)
        assert "\n" not in str(caught.value)
    for changes, message in (
        ({"base_model_name_or_path": None}, "does not name its base model"),
        ({"base_model_name_or_path": ""}, "does not name its base model"),
        (
            {"base_model_name_or_path": "./gone"},
            f"the base model of adapter {adapter}: ./gone: no such model folder",
        ),
        ({"base_model_name_or_path": str(adapter)}, "is not a model folder"),
    ):
        _edit(adapter, **changes)
        with pytest.raises(ActiveDPOError, match=message):
            as_model(adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ActiveDPOError, match="adapter_config.json: not a JSON object"):
        as_model(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ActiveDPOError, match="no adapter_model.safetensors in it"):
        as_model(adapter)
    (base / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ActiveDPOError, match="is not a causal language model that can be loaded"):
        as_model(base)
