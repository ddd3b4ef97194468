"""The settings: TRL's parsers read them, they check themselves, and the docs list them."""

from __future__ import annotations

import inspect
import typing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from activedpo_fast import (
    ActiveDPOError,
    ActiveDPOLoop,
    ActiveDPOSelector,
    LoopConfig,
    SelectorConfig,
)
from activedpo_fast.cli.options import field_rows, key_rows
from activedpo_fast.gradients.sketch import METHODS
from activedpo_fast.pool.tokens import DEFAULT_MAX_LENGTH, DEFAULT_TRUNCATION_MODE
from activedpo_fast.presets import preset
from activedpo_fast.selection.strategies import STRATEGIES
from activedpo_fast.settings import _ARGUMENTS, SAMPLING, SketchName, StrategyName, read_settings
from activedpo_fast.training.generation import generate_responses

trl = pytest.importorskip("trl")

DOCS = Path(__file__).parents[2] / "docs"


def test_every_field_has_a_help_text() -> None:
    for settings in (SelectorConfig, LoopConfig):
        for field in fields(settings):
            text = field.metadata["help"]
            assert text.endswith(".") and "%" not in text, field.name  # argparse formats "%"
        trl.TrlParser(settings).format_help()


def test_names_are_those_of_the_parts() -> None:
    assert typing.get_args(StrategyName) == tuple(STRATEGIES)
    assert set(typing.get_args(SketchName)) == set(METHODS)
    assert SelectorConfig.max_length == DEFAULT_MAX_LENGTH
    assert SelectorConfig.truncation_mode == DEFAULT_TRUNCATION_MODE
    sampling = inspect.signature(generate_responses).parameters
    for name in set(SAMPLING) - {"num_generations"}:
        assert getattr(LoopConfig, name) == sampling[name].default, name


def test_a_command_line_and_yaml_are_read_by_trl(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "normalize": "pair",
                "max_length": None,
                "chat_template_kwargs": {"enable_thinking": False},
                "verify": False,
                "proj_dim": 64,
            }
        )
    )
    (args,) = trl.TrlParser(SelectorConfig).parse_args_and_config(
        ["--config", str(file), "--proj_dim", "128", "--bf16", "--strategy_options", '{"a": 1}']
    )
    assert args == SelectorConfig(
        normalize="pair",
        max_length=None,
        chat_template_kwargs={"enable_thinking": False},
        verify=False,
        proj_dim=128,
        bf16=True,
        strategy_options={"a": 1},
    )
    (loop,) = trl.TrlParser(LoopConfig).parse_args_and_config(
        ["--output_dir", "o", "--selector-options", '{"lam": 0.5}', "--train_on", "newest"]
    )
    assert loop == LoopConfig(
        output_dir=Path("o"), selector_options={"lam": 0.5}, train_on="newest"
    )
    (same,) = trl.TrlParser(LoopConfig).parse_dict({"output_dir": "o", "rounds": 2})
    assert same == LoopConfig("o", rounds=2)
    with pytest.raises(ActiveDPOError, match="rounds: 0 is below 1"):
        trl.TrlParser(LoopConfig).parse_args_and_config(["--output_dir", "o", "--rounds", "0"])


def test_one_command_line_for_the_loop_and_dpo() -> None:
    """What both have reaches both, if each is parsed by itself."""
    line = "--output_dir o --seed 3 --rounds 2 --beta 0.3 --use_cpu --temperature 0.7".split()
    args, rest = trl.TrlParser(LoopConfig).parse_args_and_config(
        line, return_remaining_strings=True
    )
    dpo_args, other = trl.TrlParser(trl.DPOConfig).parse_args_and_config(
        line, return_remaining_strings=True
    )
    assert (args.output_dir, args.seed, args.rounds, args.temperature) == (Path("o"), 3, 2, 0.7)
    assert (dpo_args.output_dir, dpo_args.seed, dpo_args.beta) == ("o", 3, 0.3)
    assert rest == ["--beta", "0.3", "--use_cpu"]
    assert other == ["--rounds", "2", "--temperature", "0.7"]


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (SelectorConfig, {"strategy": "best"}, "strategy: expected 'activedpo' or 'random' or"),
        (SelectorConfig, {"beta": 0.0}, "beta: 0.0 is not positive and finite"),
        (SelectorConfig, {"lam": float("nan")}, "lam: nan is not positive and finite"),
        (SelectorConfig, {"kappa": "1"}, "kappa: expected a number, got '1'"),
        (SelectorConfig, {"sketch": "dense"}, "sketch: expected 'sjlt' or"),
        (SelectorConfig, {"proj_dim": 0}, "proj_dim: 0 is below 1"),
        (SelectorConfig, {"proj_dim": True}, "proj_dim: expected an integer, got True"),
        (SelectorConfig, {"seed": -1}, "seed: -1 is below 0"),
        (SelectorConfig, {"normalize": "l2"}, "normalize: expected 'default' or 'response'"),
        (SelectorConfig, {"max_length": 1}, "max_length: 1 leaves no token to score"),
        (SelectorConfig, {"truncation_mode": "middle"}, "truncation_mode: expected"),
        (SelectorConfig, {"max_tokens_per_batch": 0}, "max_tokens_per_batch: 0 is below 1"),
        (SelectorConfig, {"strategy_options": "{"}, "strategy_options: not JSON"),
        (SelectorConfig, {"strategy_options": "[1]"}, "strategy_options: expected a section"),
        (SelectorConfig, {"chat_template_kwargs": "[1]"}, "chat_template_kwargs: expected a"),
        (SelectorConfig, {"verify": "no"}, "verify: expected true or false, got 'no'"),
        (LoopConfig, {"train_on": "some"}, "train_on: expected 'all' or 'newest', got 'some'"),
        (LoopConfig, {"num_generations": 1}, "num_generations: 1 is below 2"),
        (LoopConfig, {"temperature": 0}, "temperature: 0 is not above 0"),
        (LoopConfig, {"top_p": 1.5}, "top_p: 1.5 is not in"),
        (LoopConfig, {"output_dir": 3}, "output_dir: expected text or a path, got 3"),
    ],
)
def test_what_is_wrong_is_named(settings: Any, given: dict[str, Any], message: str) -> None:
    needed = {"output_dir": "o"} if settings is LoopConfig else {}
    with pytest.raises(ActiveDPOError) as caught:
        settings(**{**needed, **given})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_settings_are_given_once() -> None:
    args = SelectorConfig(seed=1)
    assert read_settings(SelectorConfig, args, {}, None) == (args, "activedpo")
    assert read_settings(SelectorConfig, None, {"seed": 1}, "random") == (
        SelectorConfig(strategy="random", seed=1),
        "random",
    )
    own = object()
    assert read_settings(SelectorConfig, args, {}, own) == (args, own)
    for options, strategy, message in (
        ({"seed": 2, "lam": 1.0}, None, "seed, lam: settings are given twice"),
        ({}, "random", "strategy: settings are given twice"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            read_settings(SelectorConfig, args, options, strategy)
    with pytest.raises(ActiveDPOError, match="args: expected a LoopConfig, got SelectorConfig"):
        read_settings(LoopConfig, args, {}, None)  # type: ignore[arg-type]
    with pytest.raises(ActiveDPOError, match="normalise: unknown option; did you mean 'normalize'"):
        read_settings(SelectorConfig, None, {"normalise": "pair"}, None)
    with pytest.raises(ActiveDPOError, match="output_dir: missing"):
        read_settings(LoopConfig, None, {}, None)


def test_misspelled_options_name_the_closest() -> None:
    for kind, front_door in ((SelectorConfig, ActiveDPOSelector), (LoopConfig, ActiveDPOLoop)):
        named = inspect.signature(front_door).parameters
        keywords = {name for name in named if name not in ("options", "model", "prompts", "oracle")}
        assert set(_ARGUMENTS[kind]) | {"strategy"} == keywords
        for name in {field.name for field in fields(kind)} | set(_ARGUMENTS[kind]):
            with pytest.raises(ActiveDPOError, match=f"unknown option; did you mean '{name}'"):
                read_settings(kind, None, {f"{name}z": 1}, None)
    with pytest.raises(ActiveDPOError, match="ref_modl: unknown option; did you mean 'ref_model'"):
        ActiveDPOSelector("no model is loaded for this", ref_modl="ref")
    with pytest.raises(ActiveDPOError, match="xyz: unknown option; known: beta, bf16, "):
        read_settings(SelectorConfig, None, {"xyz": 1}, None)


def test_presets_give_settings() -> None:
    paper = preset("paper")
    assert paper.selector_config(proj_dim=64) == SelectorConfig(normalize="response", proj_dim=64)
    # The normalization is of the preset's strategy.
    assert paper.selector_config(strategy="adpo_plus").normalize == "default"
    assert paper.selector_config(strategy="adpo_plus", normalize="pair").normalize == "pair"
    loop = paper.loop_config(output_dir="o", rounds=2, selector_options={"lam": 0.5})
    assert (loop.batch_size, loop.num_generations, loop.rounds) == (50, 3, 2)
    assert loop.selector_options == {"proj_dim": 8192, "normalize": "response", "lam": 0.5}
    assert asdict(paper.loop_config(output_dir="o", strategy="random"))["strategy"] == "random"
    inside = paper.loop_config(output_dir="o", selector_options={"strategy": "random"})
    assert inside == paper.loop_config(output_dir="o", strategy="random")


def _table(page: str, before: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return text[text.index(before) :].split("\n\n")[1].splitlines()[2:]


def test_the_tables_in_the_docs_are_the_settings() -> None:
    for page, before, found in (
        ("cli.md", "Keys of `loop`", key_rows("loop")),
        ("cli.md", "Keys of `selection`", key_rows("selection")),
        ("cli.md", "Keys of `evaluate`", key_rows("evaluate")),
        ("api.md", "Fields of `SelectorConfig`", field_rows(SelectorConfig)),
        ("api.md", "Fields of `LoopConfig`", field_rows(LoopConfig)),
    ):
        rows = [f"| `{row.name}` | {row.type} | {row.default} | {row.help} |" for row in found]
        assert _table(page, before) == rows, f"docs/{page} should have\n" + "\n".join(rows)


def test_settings_that_were_set_later_are_checked_and_copied() -> None:
    args = SelectorConfig()
    args.proj_dim = -1
    with pytest.raises(ActiveDPOError, match="proj_dim: -1 is below 1"):
        read_settings(SelectorConfig, args, {}, None)
    args.proj_dim, args.strategy_options = 64, {"shortlist": 3}
    read, _ = read_settings(SelectorConfig, args, {}, None)
    assert read == args
    args.proj_dim = 128
    args.strategy_options["shortlist"] = 4
    assert (read.proj_dim, read.strategy_options) == (64, {"shortlist": 3})


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (SelectorConfig, {"beta": 10**400}, "beta: .* is not positive and finite"),
        (SelectorConfig, {"strategy_options": '"x"'}, "strategy_options: expected a section"),
        (SelectorConfig, {"strategy_options": {1: 2}}, "strategy_options: expected a section"),
        (LoopConfig, {"output_dir": "x", "seed": -1}, "seed: -1 is below 0"),
        (LoopConfig, {"output_dir": "x", "temperature": float("inf")}, "temperature: inf"),
    ],
)
def test_values_that_would_fail_later_are_refused(
    settings: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ActiveDPOError, match=message):
        settings(**given)


def test_presets_name_what_is_wrong() -> None:
    paper = preset("paper")
    with pytest.raises(ActiveDPOError, match="projdim: unknown option"):
        paper.selector_config(projdim=1)
    with pytest.raises(ActiveDPOError, match="round: unknown option"):
        paper.loop_config(output_dir="x", round=1)
    with pytest.raises(ActiveDPOError, match="output_dir: missing"):
        paper.loop_config()
    with pytest.raises(ActiveDPOError, match="selector_options: expected a section of keys"):
        paper.loop_config(output_dir="x", selector_options=[1])
    with pytest.raises(ActiveDPOError, match="strategy: given twice, in selector_options too"):
        paper.loop_config(output_dir="x", strategy="apo", selector_options={"strategy": "random"})
    with pytest.raises(ActiveDPOError, match="unknown preset"):
        preset(["paper"])  # type: ignore[arg-type]
    loop = paper.loop_config(output_dir="x", selector_options='{"beta": 0.5}')
    assert loop.selector_options == {"proj_dim": 8192, "normalize": "response", "beta": 0.5}
