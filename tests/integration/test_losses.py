"""Whether a loss of TRL trains sums or means of log-probs, and that features and rewards do the
same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from activedpo_fast import ActiveDPOError, ActiveDPOSelector, PreferencePool
from activedpo_fast.cli.app import main
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.models.adapters import adapter_state, load_adapter_state
from activedpo_fast.pool.tokens import scored_tokens, tokenize_pool
from activedpo_fast.training.options import _MEANS, _SUMS
from activedpo_fast.training.trl import dpo_config, selector_settings
from tests.support.gradients import relative_error, trainable
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.quick import slow_except

trl = pytest.importorskip("trl")

PAIRS = [
    ("The quick", " brown", " dog jumps over the lazy fox, 0123456789 times."),
    ("TL;DR: ", "choose well, label less, choose well", "label"),
    ("What is a sketch?", " A short random projection.", " It is what people prefer, one of them"),
]
POOL = PreferencePool.from_rows(
    {"id": str(n), "prompt": prompt, "responses": list(responses)}
    for n, (prompt, *responses) in enumerate(PAIRS)
)
DATA = Dataset.from_list(
    [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in PAIRS
    ]
)
BETA = 0.3


def _args(tmp_path: Path, loss_type: Any, **options: Any) -> Any:
    return dpo_config(
        **{
            "output_dir": str(tmp_path),
            "beta": BETA,
            "loss_type": loss_type,
            "label_smoothing": 0.1,
            **options,
        }
    )


def _trainer(model: Any, args: Any) -> Any:
    trainer = trl.DPOTrainer(
        model=model, args=args, train_dataset=DATA, processing_class=tiny_tokenizer()
    )
    model.eval()
    return trainer


def _losses(trainer: Any) -> list[torch.Tensor]:
    """TRL's own loss of every pair, with its graph."""
    return [
        trainer.compute_loss(trainer.model, trainer.data_collator([row]))
        for row in trainer.train_dataset
    ]


def _features(model: Any, settings: dict[str, Any]) -> torch.Tensor:
    """φ of the three pairs, exact and not normalized."""
    extractor = ActiveDPOSelector(model, tiny_tokenizer(), sketch="none", **settings).extractor
    tokens = tokenize_pool(
        POOL,
        tiny_tokenizer(),
        max_length=settings["max_length"],
        truncation_mode=settings["truncation_mode"],
    )
    rows = extractor.gradients(tokens, show_progress=False).gradients
    return rows[0::2] - rows[1::2]


def _cosines(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(found.double(), expected.double(), dim=1)


def _gradients(model: Any, args: Any) -> torch.Tensor:
    """Gradients of TRL's own loss of every pair, where policy and reference are the same."""
    trainer = _trainer(model, args)
    parameters = list(trainable(model).values())
    return torch.stack(
        [
            torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
            for loss in _losses(trainer)
        ]
    )


# `apo_down` changes only the rejected response where policy and reference are the same.
@pytest.mark.parametrize(
    "loss_type",
    slow_except(
        ["sigmoid", "ipo", "sigmoid_norm", "apo_zero"], sorted((_SUMS | _MEANS) - {"apo_down"})
    ),
)
def test_features_point_where_the_loss_of_trl_does(loss_type: str, tmp_path: Path) -> None:
    """At the reference the gradient of a pair's loss is a multiple of ∇(r_chosen − r_rejected)."""
    args = _args(tmp_path, loss_type)
    model = lora(tiny_causal_lm("llama"), "llama")
    expected = _gradients(model, args)
    settings = selector_settings(args)
    features = _features(model, settings)
    assert _cosines(features, expected).abs().tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    other = _features(model, {**settings, "length_normalized": loss_type in _SUMS})
    assert float(_cosines(other, expected).abs().min()) < 0.98
    if loss_type == "ipo":  # (δ − 1/2β)² with δ = 0: the length is also right
        assert relative_error(-features / BETA**2, expected) < 1e-4
    if loss_type in ("sigmoid", "sigmoid_norm"):
        assert relative_error(-features / 2, expected) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "robust", "label_smoothing": 0.3},
        {"use_weighting": True},
        {"padding_free": True},
        {"precompute_ref_log_probs": True},
        {"ld_alpha": 1.0},
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.0]},
        *slow_except(
            [],
            [
                {"loss_type": "discopop", "discopop_tau": 0.5},
                {"pad_token": "The"},
                {"pad_to_multiple_of": 64},
                {"disable_dropout": False},
                {"dataset_num_proc": 1},
                {"label_smoothing_factor": 0.2},
                {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
            ],
        ),
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
def test_irrelevant_options_do_not_turn_the_gradient(options: Any, tmp_path: Path) -> None:
    args = _args(tmp_path, **{"loss_type": "sigmoid", **options})
    model = lora(tiny_causal_lm("llama"), "llama")
    expected = _gradients(model, args)
    features = _features(model, selector_settings(args))
    assert _cosines(features, expected).abs().tolist() == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize(
    "options", [{"ld_alpha": 0.5}, {"loss_type": ["sigmoid", "ipo"]}, {"loss_type": "apo_down"}]
)
def test_refused_options_turn_the_gradient(options: Any, tmp_path: Path) -> None:
    """So does `apo_down`, which is documented and allowed because its reward is that of the
    features."""
    args = _args(tmp_path, **{"loss_type": "sigmoid", **options})
    model = lora(tiny_causal_lm("llama"), "llama")
    features = _features(model, selector_settings(_args(tmp_path, "sigmoid")))
    assert float(_cosines(features, _gradients(model, args)).abs().min()) < 0.98


@pytest.mark.parametrize(
    ("loss_type", "max_length", "truncation_mode"),
    slow_except(
        [
            ("sigmoid", 1024, "keep_start"),
            ("ipo", 12, "keep_start"),
            ("sigmoid_norm", 8, "keep_end"),
        ],
        [
            (loss_type, *cut)
            for loss_type in ("sigmoid", "ipo", "sigmoid_norm")
            for cut in ((1024, "keep_start"), (12, "keep_start"), (8, "keep_end"))
        ],
    ),
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_reward_differences_are_those_of_the_loss(
    loss_type: str, max_length: int, truncation_mode: str, tmp_path: Path
) -> None:
    """Away from the reference, by the value of TRL's loss; `keep_end` scores one token less than
    the response has where nothing of the prompt is left."""
    args = _args(tmp_path, loss_type, max_length=max_length, truncation_mode=truncation_mode)
    model = lora(tiny_causal_lm("llama"), "llama")
    trainer = _trainer(model, args)
    load_adapter_state(model, {n: 1.5 * w for n, w in adapter_state(model).items()})
    losses = torch.stack(_losses(trainer)).detach().double()
    settings = selector_settings(args)
    selector = ActiveDPOSelector(
        model, tiny_tokenizer(), strategy="margin_large", proj_dim=64, **settings
    )
    picked = {pick.id: pick for pick in selector.select(POOL, 3, show_progress=False)}
    d = torch.tensor([picked[item.id].score for item in POOL], dtype=torch.float64)
    assert float(d.min()) > 1e-4
    by_sign = [
        (
            (sign * d / BETA - 1 / (2 * BETA)).square()
            if loss_type == "ipo"
            else -torch.nn.functional.logsigmoid(sign * d)
        )
        for sign in (1, -1)
    ]
    error = torch.minimum(*((found - losses).abs() for found in by_sign))
    assert float((error / losses).max()) < 1e-5
    tokens = selector.tokenize(POOL)
    if truncation_mode == "keep_end":
        assert any(
            scored_tokens(s) < len(s.input_ids) - s.completion_start for s in tokens.sequences
        )


def _pool_of_three() -> PreferencePool:
    return PreferencePool.from_rows(
        {"id": item.id, "prompt": item.prompt, "responses": [*item.responses, " fox dog"]}
        for item in POOL
    )


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("max_tokens", [None, 40])
def test_relative_rows_are_differences_of_means(verify: bool, max_tokens: int | None) -> None:
    """With shared prompts (which needs `verify`) or not, and items batched together or not."""
    # Its norms are also computed in float64.
    model = lora(tiny_causal_lm("gpt2", torch.float64), "gpt2")
    tokens = tokenize_pool(_pool_of_three(), tiny_tokenizer(), max_length=14)
    options: dict[str, Any] = dict(beta=BETA, max_tokens_per_batch=max_tokens, verify=verify)
    plain = FeatureExtractor(model, Sketch("none"), **options).gradients(tokens)
    means = FeatureExtractor(model, Sketch("none"), length_normalized=True, **options)
    lengths = torch.tensor([len(s.input_ids) - s.completion_start for s in tokens.sequences])
    assert len(set(lengths.tolist())) > 3
    expected = plain.gradients / lengths[:, None]
    taken, relative = means.gradients(tokens), means.gradients(tokens, relative=True)
    for rows in (taken, relative):
        assert torch.allclose(rows.logps, plain.logps / lengths, rtol=1e-12)
    assert torch.allclose(means.logps(tokens), plain.logps / lengths, rtol=1e-9)
    assert relative_error(taken.gradients, expected) < 1e-12
    first = expected[0::3].repeat_interleave(3, dim=0)
    others = [row for row in range(9) if row % 3]
    assert relative_error(relative.gradients[others], (expected - first)[others]) < 1e-9
    assert not relative.gradients[0::3].any()


def test_length_normalization_costs_no_precision() -> None:
    """Rows are divided, not the objective: they are the rows of the sums, rounded once."""
    model = lora(tiny_causal_lm("llama", torch.bfloat16), "llama")
    tokens = tokenize_pool(POOL, tiny_tokenizer())
    plain = FeatureExtractor(model, Sketch("none"), beta=1.0).gradients(tokens)
    means = FeatureExtractor(model, Sketch("none"), beta=1.0, length_normalized=True)
    lengths = means.lengths(tokens)
    assert lengths is not None
    rows = means.gradients(tokens).gradients
    assert relative_error(rows * lengths[:, None], plain.gradients) < 1e-6


def test_loss_types_set_it_or_are_refused(tmp_path: Path) -> None:
    def settings(loss_type: Any, **options: Any) -> dict[str, Any]:
        return selector_settings(_args(tmp_path, loss_type, **options))

    for name in _MEANS:
        assert settings(name)["length_normalized"] is True
        assert settings([name, "sft"])["length_normalized"] is True
    for name in _SUMS:
        assert "length_normalized" not in settings(name)
    assert "length_normalized" not in settings(["sigmoid", "ipo"], loss_weights=[1.0, 0.0])
    assert settings(["ipo", "sigmoid_norm"])["length_normalized"] is True
    for loss_type, message in (
        (["sigmoid", "ipo"], "'ipo' trains mean log-probs and 'sigmoid'"),
        ("sft", "'sft' learns nothing from a preference"),
        ("kto", "'kto' is not known; known: aot, aot_unpaired"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            settings(loss_type)


def test_every_loss_type_of_trl_is_known() -> None:
    """The list in DPOTrainer's own error."""
    import inspect
    import re

    source = inspect.getsource(trl.DPOTrainer)
    listed = source[source.index("Should be one of [") :]
    listed = listed[: listed.index("]")]
    assert set(re.findall(r"'(\w+)'", listed)) == _SUMS | _MEANS | {"sft"}


def test_run_refuses_before_a_model_is_loaded(tmp_path: Path, capsys: Any) -> None:
    config = {
        "model": "no_such_folder",
        "prompts": "none.jsonl",
        "oracle": {"kind": "people", "via": "files"},
        "output_dir": str(tmp_path / "run"),
        "lora": {},
        "dpo": {"bf16": False, "ld_alpha": 0.5},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert main(["run", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert "DPOConfig: ld_alpha=0.5" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_features_command(tmp_path: Path, capsys: Any) -> None:
    base = tiny_causal_lm("llama")
    base.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lora(base, "llama").save_pretrained(tmp_path / "adapter")
    POOL.to_jsonl(tmp_path / "pool.jsonl")
    rows = {}
    for name, flags in (("sums", []), ("means", ["--length-normalized"])):
        argv = [
            "features",
            str(tmp_path / "pool.jsonl"),
            "--model",
            str(tmp_path / "model"),
            "--adapter",
            str(tmp_path / "adapter"),
            "--output",
            str(tmp_path / name),
            "--export",
            str(tmp_path / f"{name}.safetensors"),
            "--sketch",
            "none",
            "--quiet",
        ]
        assert main([*argv, *flags]) == 0
        rows[name] = load_file(tmp_path / f"{name}.safetensors")["features"]
    lengths = torch.tensor(
        [
            len(s.input_ids) - s.completion_start
            for s in tokenize_pool(POOL, tiny_tokenizer()).sequences
        ]
    )
    assert relative_error(rows["means"], rows["sums"] / lengths[:, None]) < 1e-6
    manifest = json.loads((tmp_path / "means" / "manifest.json").read_text())
    assert manifest["settings"]["length_normalized"] is True
    argv[argv.index("--output") + 1] = str(tmp_path / "sums")
    capsys.readouterr()
    assert main([*argv, "--length-normalized"]) == 2
    assert "length_normalized" in capsys.readouterr().err
