"""Settings that cannot work are refused before a run begins, by a rehearsal that leaves no
trace."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from activedpo_fast._files import read_checked_json, write_checked_json
from activedpo_fast.errors import ActiveDPOError, UnsupportedParameterError
from activedpo_fast.labels import FileOracle, LabelsPending
from activedpo_fast.pool.items import Prompt
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.trl import dpo_config
from tests.integration.test_trl_round import _snapshot
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

WORDS = "library prompt model sketch label pair fox dog".split()
PROMPTS = [Prompt(f"p{n}", f"The {word}") for n, word in enumerate(WORDS)]
CHAT = [Prompt(p.id, [{"role": "user", "content": str(p.prompt)}]) for p in PROMPTS]


def _loop(
    folder: Path,
    *,
    dpo: dict[str, Any] | None = None,
    model: Any = None,
    prompts: Any = PROMPTS,
    selector: dict[str, Any] | None = None,
    **options: Any,
) -> ActiveDPOLoop:
    training = {
        "learning_rate": 1e-2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        **(dpo or {}),
    }
    settings: dict[str, Any] = dict(
        batch_size=3, rounds=2, prompts_per_round=4, num_generations=2, max_completion_length=4
    )
    return ActiveDPOLoop(
        lora(tiny_causal_lm("llama"), "llama") if model is None else model,
        tiny_tokenizer(chat=prompts is CHAT),
        prompts,
        FileOracle(folder / "people"),
        output_dir=folder / "run",
        dpo_args=dpo_config(output_dir=str(folder / "run"), **training),
        selector_options={"proj_dim": 64, "verify": False, **(selector or {})},
        show_progress=False,
        **{**settings, **options},
    )


def _refused(loop: ActiveDPOLoop) -> str:
    with pytest.raises(ActiveDPOError) as caught:
        loop.run()
    assert not isinstance(caught.value, LabelsPending)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        # Each of these fails only in the trainer, or after the first training step.
        ({"eval_strategy": "steps", "eval_steps": 1}, "dpo.eval_strategy: "),
        ({"eval_on_start": True}, "dpo: .*eval_dataset.*eval_on_start"),
        ({"pad_token": "<nope>"}, "dpo.pad_token: "),
        (
            {"precompute_ref_log_probs": True},
            "dpo.precompute_ref_log_probs: .*reference to 'round'",
        ),
        ({"router_aux_loss_coef": 0.1}, "dpo.router_aux_loss_coef: "),
        ({"loss_type": "exo_pair"}, "dpo.loss_type: Label smoothing"),
        ({"lr_scheduler_kwargs": {"nope": 1}}, "dpo: TypeError: .*nope.*lr_scheduler_kwargs"),
        ({"report_to": ["abacus"]}, "dpo.report_to: abacus"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 4},
            "dpo.dataloader_drop_last: .*only batch, of 3 pairs: per_device_train_batch_size is 4",
        ),
        ({"max_length": 2}, "dpo.max_length=2"),
        ({"sync_ref_model": True}, "sync_ref_model"),
    ],
)
def test_settings_that_the_trainer_refuses_are_refused_before_anything_is_written(
    tmp_path: Path, dpo: dict[str, Any], message: str
) -> None:
    with pytest.raises(ActiveDPOError, match=message) as caught:
        _loop(tmp_path, dpo=dpo).run()  # some may be refused when the loop is created
    assert not isinstance(caught.value, LabelsPending) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_cannot_be_trained_or_scored(tmp_path: Path) -> None:
    head = lora(tiny_causal_lm("llama"), "llama", target_modules=["q_proj", "lm_head"])
    assert "lm_head" in _refused(_loop(tmp_path, model=head, selector={"verify": True}))
    # Random selection takes no gradients: only the trainer refuses.
    message = _refused(_loop(tmp_path, model=head, strategy="random"))
    assert message.startswith("lora.target_modules: ") and "lm_head" in message
    tokens = tiny_tokenizer()("The quick")["input_ids"]
    activated = lora(tiny_causal_lm("llama"), "llama", alora_invocation_tokens=tokens)
    with pytest.raises(UnsupportedParameterError, match="Activated LoRA is not supported"):
        _loop(tmp_path, model=activated)
    assert list(tmp_path.iterdir()) == []


def test_every_prompt_of_every_round_is_checked(tmp_path: Path) -> None:
    long = [*PROMPTS[:-1], Prompt("long", "The fox " * 150)]
    # The seed decides the order: with this one, the long prompt is not in the first round.
    message = _refused(
        _loop(
            tmp_path,
            model=lora(tiny_causal_lm("gpt2"), "gpt2"),
            prompts=long,
            prompts_per_round=1,
            batch_size=1,
            seed=1,
        )
    )
    assert message.startswith("generation: item 'long': ") and "256 positions" in message
    with pytest.raises(ActiveDPOError, match="top_p: 2 is not in"):  # as soon as it is given
        _loop(tmp_path, top_p=2)
    message = _refused(_loop(tmp_path, batch_size=5))
    assert message.startswith("loop.batch_size: 5 pairs") and "have 4" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"dpo": {"gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 1}},
        {
            "dpo": {"bf16": True, "neftune_noise_alpha": 5.0},
            "prompts": CHAT,
            "num_generations": 3,
            "selector": {"verify": True},
        },
        {
            "dpo": {"precompute_ref_log_probs": True, "full_determinism": True},
            "reference": "round",
            "strategy": "margin_small",
            "selector": {"verify": True},
        },
        {"eight_bits": True},
    ],
    ids=["checkpointing", "chat", "precompute", "8-bit"],
)
def test_a_rehearsal_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = lora(tiny_causal_lm("llama"), "llama")
    if options.pop("eight_bits", False):
        model.get_base_model().is_loaded_in_8bit = True  # TRL then casts the adapter to bfloat16
    model.generate(**tiny_tokenizer()("The", return_tensors="pt"), max_new_tokens=2)
    loop = _loop(tmp_path, model=model, **options)

    def state() -> dict[str, Any]:
        tokenizer = loop.processing_class
        return {
            **_snapshot(model),
            "python": random.getstate(),
            "numpy": str(numpy.random.get_state()),
            "torch": torch.get_rng_state().tolist(),
            "deterministic": (
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.cudnn.deterministic,
            ),
            "variables": dict(os.environ),
            "tokenizer": (tokenizer.pad_token, tokenizer.padding_side),
            "arguments": loop.dpo_args.to_dict(),
            "layouts": (
                dict(loop.selector.extractor._layouts._gradients),
                dict(loop.selector.extractor._layouts._forward),
            ),
        }

    tensors = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    before = state()
    loop._rehearse()
    after = state()
    assert after.keys() == before.keys()
    for name in before:
        assert after[name] == before[name], name
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert now.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert now[name].dtype == tensor.dtype and torch.equal(now[name], tensor), name
    assert list((tmp_path / "temporary").glob("activedpo-*")) == []
    assert not (tmp_path / "run").exists()


def test_rehearsed_once_and_again_when_settings_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="activedpo_fast")
    for dpo, rehearsed in (({}, 1), ({}, 0), ({"learning_rate": 1e-3}, 1)):
        caplog.clear()
        with pytest.raises(LabelsPending):
            _loop(tmp_path, dpo=dpo).run()
        assert caplog.text.count("rehearsed generation") == rehearsed
    assert "dpo.learning_rate (0.01, now 0.001)" in caplog.text


# -- settings that may still change ----------------------------------------------------------------


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "run" / "config.json").read_text())["settings"]
    return settings


def _label(folder: Path, label: int | str = 0) -> None:
    """Label the lines that have no label yet."""
    for path in (folder / "people").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(
                json.dumps({**row, "label": label if row["label"] is None else row["label"]}) + "\n"
                for row in rows
            )
        )


def test_training_settings_change_until_a_round_was_trained(tmp_path: Path) -> None:
    with pytest.raises(LabelsPending):
        _loop(tmp_path).run()
    for options, name in (
        ({"selector": {"proj_dim": 32}}, "selector_options.proj_dim"),
        ({"dpo": {"beta": 0.2}}, "dpo.beta"),
        ({"dpo": {"max_length": 99}}, "dpo.max_length"),
        ({"dpo": {"loss_type": "ipo"}}, "dpo.loss_type"),
        ({"strategy": "random"}, "strategy"),
        ({"max_completion_length": 5}, "max_completion_length"),
        ({"rules": PickRules(max_per_prompt=1)}, "rules"),
        ({"seed": 1}, "seed"),
    ):
        assert f"other settings: {name} (" in _refused(_loop(tmp_path, **options))
    _label(tmp_path)
    before = _settings(tmp_path)
    assert "dpo.pad_token" in _refused(_loop(tmp_path, dpo={"pad_token": "<nope>"}))
    assert _settings(tmp_path) == before

    other: dict[str, Any] = {"dpo": {"learning_rate": 2e-2}, "train_on": "newest"}
    with pytest.raises(LabelsPending):
        _loop(tmp_path, **other).run()
    assert (tmp_path / "run" / "round-000" / "adapter").exists()
    assert _settings(tmp_path)["dpo"]["learning_rate"] == 2e-2
    assert "dpo.learning_rate (0.02, now 0.01)" in _refused(_loop(tmp_path, train_on="newest"))
    # One round was trained: "all" and "newest" are the same so far, and logs change nothing.
    other = {"dpo": {"learning_rate": 2e-2, "logging_steps": 1}}
    with pytest.raises(LabelsPending):
        _loop(tmp_path, **other).run()
    _label(tmp_path)
    assert [record.labels_total for record in _loop(tmp_path, **other).run()] == [0, 3, 6]
    assert "train_on ('all', now 'newest')" in _refused(
        _loop(tmp_path, dpo=other["dpo"], train_on="newest")
    )


def test_a_round_without_a_preference_does_not_count_as_trained(tmp_path: Path) -> None:
    with pytest.raises(LabelsPending):
        _loop(tmp_path).run()
    _label(tmp_path, "skip")
    with pytest.raises(LabelsPending):
        _loop(tmp_path).run()
    assert (tmp_path / "run" / "round-000" / "adapter").exists()
    # Nothing depends on how rounds are trained, nor on the reference, which was the policy.
    dpo = {"learning_rate": 2e-2}
    with pytest.raises(LabelsPending):
        _loop(tmp_path, dpo=dpo, reference="round").run()
    _label(tmp_path)
    _loop(tmp_path, dpo=dpo, reference="round").run()
    # One round was trained, so that all labels are the newest.
    _loop(tmp_path, dpo=dpo, reference="round", train_on="newest").run()
    assert "dpo.learning_rate (0.02, now 0.01)" in _refused(
        _loop(tmp_path, reference="round", train_on="newest")
    )


def test_settings_of_earlier_stages_change_until_these_were_complete(tmp_path: Path) -> None:
    # Nothing was generated: so cold that all responses are the same.
    assert "distinct responses" in _refused(_loop(tmp_path, temperature=1e-6))
    assert "seed (0, now 1)" in _refused(_loop(tmp_path, seed=1))  # the first adapter's too
    # Generated, but nothing picked.
    assert "min_score" in _refused(_loop(tmp_path, rules=PickRules(min_score=1e6)))
    pool = (tmp_path / "run" / "round-000" / "pool.jsonl").read_bytes()
    assert "rules.exclude (" in _refused(_loop(tmp_path, rules=PickRules(exclude=["p0"])))
    assert "temperature (1.0, now 2.0)" in _refused(_loop(tmp_path, temperature=2.0))
    with pytest.raises(LabelsPending):
        _loop(tmp_path, selector={"proj_dim": 32}, batch_size=2).run()
    assert (tmp_path / "run" / "round-000" / "pool.jsonl").read_bytes() == pool
    assert _settings(tmp_path)["rules"] is None and _settings(tmp_path)["batch_size"] == 2


def test_results_are_those_of_a_run_that_was_never_corrected(tmp_path: Path) -> None:
    adapters = []
    for name, first in (("mended", {"learning_rate": 5.0}), ("right", {})):
        with pytest.raises(LabelsPending):
            _loop(tmp_path / name, dpo=first, rounds=1).run()
        _label(tmp_path / name)
        _loop(tmp_path / name, rounds=1).run()
        adapters.append(
            [
                path.read_bytes()
                for path in sorted(
                    (tmp_path / name / "run").glob("*/adapter/adapter_model.safetensors")
                )
            ]
        )
    assert len(adapters[0]) == 2 and adapters[0] == adapters[1]


def test_a_run_that_an_older_version_began_continues(tmp_path: Path) -> None:
    """They recorded that there may be a pad token, but not which one."""
    with pytest.raises(LabelsPending):
        _loop(tmp_path, rounds=1).run()
    _label(tmp_path)
    records = _loop(tmp_path, rounds=1).run()
    config = read_checked_json(tmp_path / "run" / "config.json")
    config["settings"]["dpo"]["pad_token"] = "<PAD_TOKEN>"
    write_checked_json(tmp_path / "run" / "config.json", config)
    assert _loop(tmp_path, rounds=1).run() == records
