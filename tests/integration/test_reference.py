"""π_ref of a selection is the one that TRL's DPOTrainer trains against, and leaves no trace."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from activedpo_fast import ActiveDPOError, ActiveDPOSelector, PreferencePool
from activedpo_fast.labels import CallableOracle
from activedpo_fast.models.adapters import adapter_state, load_adapter_state
from activedpo_fast.pool.items import Prompt
from activedpo_fast.selection.result import Selection
from activedpo_fast.training.loop import ActiveDPOLoop
from activedpo_fast.training.trl import dpo_config, train_dpo
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

trl = pytest.importorskip("trl")

NEEDY = ("aplp", "margin_small", "margin_large", "adpo_plus", "trace_plus")
POOL = PreferencePool.from_rows(
    {"id": f"item-{n}", "prompt": prompt, "responses": list(responses)}
    for n, (prompt, responses) in enumerate(
        [
            ("The quick", (" brown fox", " dog jumps over the lazy fox")),
            ("TL;DR: ", ("choose well", "label less")),
            ("What is a sketch?", (" A short random projection.", " It is")),
            ("people prefer one", (" of them", " times 0123456789")),
            ("A library", (" that decides", " aligns a model")),
        ]
    )
)
DATA = Dataset.from_list(
    [
        {"prompt": item.prompt, "chosen": item.responses[0], "rejected": item.responses[1]}
        for item in POOL
    ]
)


def _model(**options: Any) -> Any:
    """A model with an adapter as after SFT: B is not zero."""
    return lora(tiny_causal_lm("llama"), "llama", **options)


def _args(tmp_path: Path, **overrides: Any) -> Any:
    return dpo_config(
        **{
            "output_dir": str(tmp_path),
            "learning_rate": 1e-2,
            "max_steps": 3,
            "per_device_train_batch_size": 5,
            "logging_steps": 1,
            "beta": 0.5,
            "lr_scheduler_type": "constant",
            **overrides,
        }
    )


def _selector(model: Any, strategy: str = "margin_large", **options: Any) -> ActiveDPOSelector:
    return ActiveDPOSelector(
        model, tiny_tokenizer(), strategy=strategy, beta=0.5, proj_dim=64, **options
    )


def _scores(selector: ActiveDPOSelector) -> torch.Tensor:
    """|β Δ| of the five pairs, in the pool's order."""
    by_id = {pick.id: pick.score for pick in selector.select(POOL, 5, show_progress=False)}
    return torch.tensor([by_id[item.id] for item in POOL], dtype=torch.float64)


def _trainers_margins(trainer: Any) -> torch.Tensor:
    """The same numbers from DPOTrainer's own computation on a batch, with its own reference."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    model = trainer.model.eval()
    with torch.no_grad():
        policy = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        ).log_probs.sum(1)
    chosen, rejected = policy.chunk(2)
    ref_chosen, ref_rejected = trainer.compute_ref_log_probs(model, batch)
    return (0.5 * ((chosen - ref_chosen) - (rejected - ref_rejected))).abs().double()


def _state(model: Any) -> dict[str, Any]:
    """Weights, flags, modes and which adapters are active, everywhere in the model."""
    return {
        "adapters": (list(model.peft_config), model.active_adapter, model.active_adapters),
        "layers": [
            (
                name,
                module.training,
                vars(module).get("_active_adapter"),
                vars(module).get("_disable_adapters"),
            )
            for name, module in model.named_modules()
        ],
        "flags": [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    old, new = before.pop("weights"), after.pop("weights")
    assert before == after
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_the_three_forms_agree_with_dpo_trainers_own_reference(tmp_path: Path) -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    initial = adapter_state(model)
    train_dpo(model, tokenizer, DATA, _args(tmp_path), initial_adapter=initial, show_progress=False)
    trained = adapter_state(model)
    by_weights = _scores(_selector(model, ref_model=initial))
    by_model = _scores(_selector(model, ref_model=_model()))
    by_base = _scores(_selector(model))

    # TRL copies the adapter's weights when the trainer is created; then the adapter is trained.
    load_adapter_state(model, initial)
    trainer = trl.DPOTrainer(
        model=model, args=_args(tmp_path), train_dataset=DATA, processing_class=tokenizer
    )
    load_adapter_state(model, trained)
    expected = _trainers_margins(trainer)
    assert float(expected.min()) > 1e-3
    by_default = _scores(_selector(model))  # the trainer has left its adapter "ref"
    by_name = _scores(_selector(model, ref_model="ref"))
    for found in (by_weights, by_model, by_default, by_name):
        assert found.tolist() == pytest.approx(expected.tolist(), abs=2e-5)
    assert not torch.allclose(by_base, expected, atol=1e-2)


FORMS = ("weights", "name", "ref", "base")


@pytest.mark.parametrize(
    ("form", "strategy"),
    slow_except(
        [*zip(FORMS, NEEDY, strict=False), ("weights", "trace_plus")], product(FORMS, NEEDY)
    ),
)
def test_the_policy_is_left_as_it_was(form: str, strategy: str) -> None:
    model = _model()
    initial = adapter_state(model)
    name = "ref" if form == "ref" else "other"
    model.add_adapter(name, model.peft_config["default"])
    # Flags that differ within an adapter.
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(
        False
    )
    model.base_model.model.model.layers[1].train()
    before = _state(model)
    ref_model: Any = {"weights": {n: 2 * w for n, w in initial.items()}, "name": "other"}.get(form)
    selector = _selector(model, strategy, ref_model=ref_model)
    assert len(selector.select(POOL, 3, show_progress=False)) == 3
    _assert_same(before, _state(model))


def test_the_policy_is_left_as_it_was_after_an_error(monkeypatch: Any) -> None:
    model = _model()
    selector = _selector(model, ref_model={n: 2 * w for n, w in adapter_state(model).items()})
    before = _state(model)
    real, calls = selector.extractor.logps, []

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the reference's
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(selector.extractor, "logps", breaks)
    with pytest.raises(KeyboardInterrupt):
        selector.select(POOL, 3)
    _assert_same(before, _state(model))


def test_an_invalid_reference_is_one_clear_error() -> None:
    def error(model: Any, ref_model: Any) -> str:
        with pytest.raises(ActiveDPOError) as caught:
            _selector(model, ref_model=ref_model).select(POOL, 2)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    model = _model()
    assert "no adapter called 'sft'; it has default" in error(model, "sft")
    assert "'default' is active" in error(model, "default")
    assert "is the policy itself" in error(model, model)
    assert "is the policy itself" in error(model, model.get_base_model())
    assert "got int" in error(model, 3)
    assert "do not fit the model" in error(model, {})
    plain = tiny_causal_lm("llama").requires_grad_(False)
    plain.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert "of a PEFT model" in error(plain, "ref")
    assert "pass ref_model" in error(plain, None)
    biased = lora(tiny_causal_lm("llama", attention_bias=True), "llama", bias="lora_only")
    assert "bias is trained besides the adapter" in error(biased, None)
    assert len(_selector(biased, ref_model=adapter_state(biased)).select(POOL, 2)) == 2
    model.merge_adapter()
    assert "unmerge" in error(model, None)


PROMPTS = [
    Prompt(f"p{n}", f"The {word}", {})
    for n, word in enumerate("library prompt model sketch label pair".split())
]


def _loop(folder: Path, **options: Any) -> ActiveDPOLoop:
    settings: dict[str, Any] = dict(
        output_dir=folder,
        dpo_args=_args(folder / "trainer"),
        batch_size=4,
        rounds=2,
        prompts_per_round=4,
        num_generations=2,
        max_completion_length=4,
        selector_options={"proj_dim": 64, "verify": False},
        show_progress=False,
    )
    return ActiveDPOLoop(
        _model(),
        tiny_tokenizer(),
        PROMPTS,
        CallableOracle(lambda prompt, a, b: int(a < b)),
        **{**settings, **options},
    )


def _picked(folder: Path, t: int) -> list[float]:
    return [
        pick.score
        for pick in Selection.from_jsonl(folder / f"round-00{t}" / "picked.jsonl", strategy="")
    ]


@pytest.mark.parametrize(
    ("strategy", "untrained", "reference"),
    [
        ("margin_small", 0.5, "initial"),
        pytest.param("margin_small", 0.5, "round", marks=pytest.mark.slow),
        ("margin_large", 0.0, "round"),
        pytest.param("aplp", 0.0, "initial", marks=pytest.mark.slow),
    ],
)
def test_before_training_every_reward_difference_is_zero(
    strategy: str, untrained: float, reference: Any, tmp_path: Path
) -> None:
    _loop(tmp_path, strategy=strategy, reference=reference).run()
    assert _picked(tmp_path, 0) == [untrained] * 4
    assert all(score != untrained for score in _picked(tmp_path, 1))


def test_a_round_that_starts_from_the_current_policy(tmp_path: Path, caplog: Any) -> None:
    """The policy at its own start cannot tell pairs apart, and a warning says so."""
    _loop(tmp_path, strategy="margin_small", reference="round", start_from="current").run()
    assert _picked(tmp_path, 0) == _picked(tmp_path, 1) == [0.5] * 4
    assert caplog.text.count("compares the policy with the reference") == 1


def test_adpo_plus_weights_use_the_reference_of_the_run(tmp_path: Path) -> None:
    """μ(1 - μ) is 1/4 before training, so that the scores are those of the weights 1/2."""
    loop = _loop(tmp_path, strategy="adpo_plus", rounds=1)
    model = loop.model
    loop.run()
    pool = PreferencePool.from_jsonl(tmp_path / "round-000" / "pool.jsonl")
    load_adapter_state(model, loop._initial)
    rows = loop.selector.extractor.gradients(loop.selector.tokenize(pool)).gradients.double()
    first, second = pool.pairs().unbind(1)
    largest = 0.25 * (rows[first] - rows[second]).square().sum(1).max()
    assert _picked(tmp_path, 0)[0] == pytest.approx(float(largest), rel=1e-4)


def test_the_loops_reference_is_the_trainers_after_training(tmp_path: Path) -> None:
    loop = _loop(tmp_path, strategy="margin_large")
    loop.run()
    pool = PreferencePool.from_jsonl(tmp_path / "round-001" / "pool.jsonl")
    picks = Selection.from_jsonl(tmp_path / "round-001" / "picked.jsonl", strategy="")
    data = Dataset.from_list(
        [{"prompt": p.prompt, "chosen": p.responses[0], "rejected": p.responses[1]} for p in picks]
    )
    assert len(picks) == len(pool.pairs())
    model = loop.model
    load_adapter_state(model, loop._initial)
    trainer = trl.DPOTrainer(
        model=model, args=_args(tmp_path), train_dataset=data, processing_class=tiny_tokenizer()
    )
    loop._load(tmp_path / "round-000")
    assert [p.score for p in picks] == pytest.approx(_trainers_margins(trainer).tolist(), abs=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ld_alpha": 0.5}, "ld_alpha=0.5"),
        ({"sync_ref_model": True}, "sync_ref_model=True"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl'"),
        ({"loss_type": ["sigmoid", "ipo"]}, "'ipo' trains mean log-probs"),
    ],
)
def test_options_that_selection_cannot_follow_are_refused_before_a_run(
    options: Any, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ActiveDPOError, match=message):
        _loop(folder, dpo_args=_args(tmp_path, **options))
    assert not folder.exists()


def test_a_loop_uses_the_rewards_of_its_loss(tmp_path: Path) -> None:
    """IPO: the scores of the second round are differences of mean log-ratios."""
    loop = _loop(tmp_path, strategy="margin_large", dpo_args=_args(tmp_path, loss_type="ipo"))
    assert loop.selector.extractor.length_normalized
    loop.run()
    pool = PreferencePool.from_jsonl(tmp_path / "round-001" / "pool.jsonl")
    plain = ActiveDPOSelector(loop.model, tiny_tokenizer(), beta=0.5, proj_dim=64)
    tokens = plain.tokenize(pool)
    lengths = torch.tensor([len(s.input_ids) - s.completion_start for s in tokens.sequences])
    loop._load(tmp_path / "round-000")
    policy = plain.extractor.logps(tokens)
    load_adapter_state(loop.model, loop._initial)
    rewards = 0.5 * (policy - plain.extractor.logps(tokens)) / lengths
    first, second = pool.pairs().unbind(1)
    expected = (rewards[first] - rewards[second]).abs().sort(descending=True).values
    assert _picked(tmp_path, 1) == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_loop_has_one_reference(tmp_path: Path) -> None:
    with pytest.raises(ActiveDPOError, match="'ref_model' is what the loop trains against"):
        _loop(tmp_path, selector_options={"ref_model": tiny_causal_lm("llama")})
