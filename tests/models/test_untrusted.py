"""Folders of others: nothing in them is unpickled, imported or run, and all that is read counts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import activedpo_fast
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.file_fingerprints import (
    fingerprint_adapter,
    fingerprint_model,
    fingerprint_tokenizer,
)
from activedpo_fast.models.loading import load_policy, load_reward_model
from tests.support.models import saved_model

ROOT = Path(activedpo_fast.__file__).parents[1]


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return saved_model(tmp_path / "files", chat=True)


@pytest.fixture
def evil(tmp_path: Path) -> Any:
    """A pickle; the folder that it makes is not there at the end of the test."""
    made = tmp_path / "made"
    yield pickle.dumps(_Evil(made))
    assert not made.exists()


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_pickle_of_these_tests_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Evil(tmp_path / "made")))
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_a_model_that_is_a_pickle(folders: Any, evil: bytes, name: str) -> None:
    base, adapter = folders
    (base / name).write_bytes(evil)
    (base / "training_args.bin").write_bytes(evil)
    load_policy(base, adapter=adapter)  # beside safetensors it is not read
    (base / "model.safetensors").unlink()
    with pytest.raises(ActiveDPOError, match="is not a causal language model that can be loaded"):
        load_policy(base, adapter=adapter)
    with pytest.raises(ActiveDPOError, match="is not a sequence classification model"):
        load_reward_model(base)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_an_adapter_that_is_a_pickle(folders: Any, evil: bytes, name: str) -> None:
    base, adapter = folders
    (adapter / name).write_bytes(evil)
    load_policy(base, adapter=adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ActiveDPOError, match="no adapter_model.safetensors in it"):
        load_policy(base, adapter=adapter)


@pytest.mark.parametrize(
    "name", ["shard.bin", "../outside.safetensors", "/etc/x.safetensors", 5, None]
)
def test_an_index_of_other_files(folders: Any, evil: bytes, name: Any) -> None:
    base, adapter = folders
    (base / "shard.bin").write_bytes(evil)
    (base / "model.safetensors").rename(base.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ActiveDPOError, match="which is not a safetensors file of the folder"):
        load_policy(base, adapter=adapter)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": [name]}))
    with pytest.raises(ActiveDPOError, match="no 'weight_map'"):
        fingerprint_model(base)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "corda"}, {"init_lora_weights": "eva"}])
def test_an_adapter_that_names_a_file(folders: Any, evil: bytes, settings: Any) -> None:
    base, adapter = folders
    path = adapter / "cache.pt"
    path.write_bytes(evil)
    config = {"cache_file": str(path), "covariance_file": str(path), "corda_method": "kpm"}
    _edit(adapter / "adapter_config.json", **settings, corda_config=config)
    try:
        load_policy(base, adapter=adapter)
    except ActiveDPOError as error:
        assert "\n" not in str(error)


def test_a_model_with_code_or_an_adapter_in_it(folders: Any, tmp_path: Path) -> None:
    base, adapter = folders
    (base / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'made')!r})")
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    _edit(base / "config.json", auto_map=auto)
    load_policy(base, adapter=adapter)  # the known model type is used
    _edit(base / "config.json", model_type="theirs\x1b[2J")
    with pytest.raises(ActiveDPOError, match="is not a model that can be loaded"):
        load_policy(base, adapter=adapter)
    assert not (tmp_path / "made").exists()
    shutil.copy(adapter / "adapter_config.json", base)
    with pytest.raises(ActiveDPOError, match="move the adapter into a folder of its own"):
        load_policy(base, adapter=adapter)


@pytest.mark.parametrize("length", [2**60, 2**63, 10**8 + 1, 0])
def test_a_header_that_claims_too_much(folders: Any, length: int) -> None:
    base, adapter = folders
    for path in (base / "model.safetensors", adapter / "adapter_model.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(struct.pack("<Q", length) + whole[8:])
        with pytest.raises(ActiveDPOError) as error:
            load_policy(base, adapter=adapter)
        assert str(path.parent) in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(whole)


def test_modules_of_the_current_folder(folders: Any, tmp_path: Path) -> None:
    base, adapter = folders
    here, made = tmp_path / "here", tmp_path / "made"
    (here / "megatron").mkdir(parents=True)
    for name in ("megatron/__init__", "megatron/core", "torch", "yaml", "triton", "json"):
        (here / f"{name}.py").write_text(f"import os; os.mkdir({str(made)!r})")
    _edit(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="megatron.core")
    (here / "pool.jsonl").write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    options = ["--model", base, "--adapter", adapter, "--output", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "activedpo_fast", "features", "pool.jsonl", *options],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "sets 'megatron_config', with which PEFT imports a module" in done.stderr
    assert not made.exists() and not (here / "out").exists()


# -- fingerprints ----------------------------------------------------------------------------------

_opened: set[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, os.PathLike)):
        _opened.add(os.fspath(arguments[0]))


def test_every_file_that_is_opened_is_in_a_fingerprint(folders: Any) -> None:
    global _opened
    base, adapter = folders
    extra = base / "additional_chat_templates"
    extra.mkdir()
    (extra / "other.jinja").write_text("{{ messages }}")
    sys.addaudithook(_hook)  # it cannot be removed again
    _opened = set()
    try:
        load_policy(base, adapter=adapter)
        found = {Path(path) for path in _opened if Path(path).is_relative_to(base.parent)}
    finally:
        _opened = None
    # Opened by libraries that are not written in Python.
    found |= {*base.glob("*.safetensors"), *adapter.glob("*.safetensors"), base / "tokenizer.json"}
    found = {path for path in found if path.is_file() and path.name != "README.md"}
    assert extra / "other.jinja" in found and base / "config.json" in found

    def prints() -> tuple[str, ...]:
        return fingerprint_model(base), fingerprint_adapter(adapter), fingerprint_tokenizer(base)

    before = prints()
    for path in found:
        whole = path.read_bytes()
        path.write_bytes(whole + b" ")
        assert prints() != before, path
        path.write_bytes(whole)
