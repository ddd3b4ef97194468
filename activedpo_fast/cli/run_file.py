"""The YAML file of `activedpo run`, read and checked key by key."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

from activedpo_fast._checks import describe, fits, nearest
from activedpo_fast.cli.evaluation_config import EvaluationConfig
from activedpo_fast.cli.yaml_file import read_yaml
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.template import one_setting
from activedpo_fast.presets import preset as find_preset
from activedpo_fast.settings import SAMPLING, LoopConfig, SelectorConfig, StrategyName


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration. Sections hold the given values on top of the preset's.

    Attributes:
        model, adapter, gguf_file, dtype, device, tokenizer: as in `load_policy`.
        lora: arguments of `peft.LoraConfig` for a fresh adapter; None if `adapter` is given.
        prompts: JSONL or Parquet file, or a folder (see `PreferencePool.load`), with `prompt` and
            an optional `id`; with `responses: given` in `loop`, the rows of a pool.
        output_dir: the run's folder, from which a run continues.
        seed: seed of everything random.
        strategy: name of the strategy; None for the default.
        chat_template_kwargs: arguments of the chat template, for all stages. If given in
            `selection`, they are moved here.
        selection: fields of `SelectorConfig`.
        loop: fields of `LoopConfig`.
        reward: `model`, the folder of a reward model, and options of `RewardModel`: what the
            strategy reward_gap picks by.
        rules: options of `PickRules`.
        dpo: arguments of `trl.DPOConfig`.
        oracle: `kind` ("people", "reward_model", "judge" or "recorded") and its options.
        generation: arguments of `ServerGeneration`; None to sample from the model in memory.
        evaluate: fields of `EvaluationConfig`, with `oracle` if it has prompts; None for no
            metrics.
    """

    model: str
    prompts: str
    output_dir: str
    oracle: dict[str, Any]
    preset: str | None = None
    adapter: str | None = None
    lora: dict[str, Any] | None = None
    gguf_file: str | None = None
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    strategy: StrategyName | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    selection: dict[str, Any] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] | None = None
    rules: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None


def load_config(path: str | Path) -> RunConfig:
    """Read and check a YAML file.

    Raises:
        ActiveDPOError: names the key that is unknown, missing or of the wrong type.
    """
    given = read_yaml(Path(path))
    try:
        return make_config(given)
    except ActiveDPOError as error:
        raise ActiveDPOError(f"{path}: {error}") from None


def make_config(given: Any) -> RunConfig:
    """Check a mapping with the keys of `RunConfig`; see `load_config`."""
    if not isinstance(given, Mapping):
        raise ActiveDPOError("expected a mapping of keys to values at the top level")
    check_keys(given, typing.get_type_hints(RunConfig))
    for key in ("model", "prompts", "output_dir", "oracle"):
        if given.get(key) is None:
            raise ActiveDPOError(f"{key}: missing")
    values = {key: value for key, value in given.items() if value is not None}
    for section, known in _sections().items():
        check_keys(values.get(section, {}), known, section)
    _check_oracle(values["oracle"])
    if "evaluate" in values:
        values["evaluate"] = _with_oracle(values["evaluate"], values["oracle"])
    values["loop"] = _with_responses(values)
    _check_reward(values)
    _check_generation(values)
    _check_rules(values.get("rules", {}))
    _move_template_kwargs(values)
    values = _with_preset(values)
    _check_settings(values)
    return RunConfig(**values)


def check_keys(given: Mapping[str, Any], known: Mapping[str, Any], section: str = "") -> None:
    """Raise ActiveDPOError for a key not in `known`, or a value that is not of its type there."""
    for key, value in given.items():
        name = f"{section}.{key}" if section else str(key)
        if key in _ELSEWHERE.get(section, {}):
            raise ActiveDPOError(
                f"{name}: comes from {_ELSEWHERE[section][key]}; leave it out of {section}"
            )
        if key not in known:
            hint = nearest(str(key), known, _KEYS_OF.get(section))
            raise ActiveDPOError(f"{name}: unknown key; {hint}")
        if not fits(value, known[key]) and not (value is None and not section):
            raise ActiveDPOError(f"{name}: expected {describe(known[key])}, got {short(value)}")


# -- what the sections may hold --------------------------------------------------------------------


SETTINGS = {"selection": SelectorConfig, "loop": LoopConfig, "evaluate": EvaluationConfig}

# Fields of the classes behind the sections that are no keys there, and what sets them.
_ELSEWHERE: dict[str, dict[str, str]] = {
    "selection": {
        "strategy": "the run's strategy",
        "seed": "the run's seed",
        "beta": "dpo.beta",
        "length_normalized": "dpo.loss_type",
        "max_length": "dpo.max_length",
        "truncation_mode": "dpo.truncation_mode",
    },
    "loop": {
        "output_dir": "the run's output_dir",
        "strategy": "the run's strategy",
        "selector_options": "the section selection",
        "chat_template_kwargs": "the run's chat_template_kwargs",
        "seed": "the run's seed",
    },
    "evaluate": {},
    "rules": {"seed": "the run's seed"},
    "dpo": {"output_dir": "the run's output_dir", "seed": "the run's seed"},
    # Set by this library, or the names of modules that PEFT would import.
    "lora": dict.fromkeys(
        ("peft_type", "auto_mapping", "task_type", "megatron_config", "megatron_core"),
        "this library",
    ),
}

# Where the keys of sections are listed that have too many for a message.
_KEYS_OF = {
    "dpo": "its keys are the arguments of trl.DPOConfig",
    "lora": "its keys are the arguments of peft.LoraConfig",
}


def section_keys(section: str) -> dict[str, Any]:
    """Return the keys and types of a section of `SETTINGS`."""
    return _keys(SETTINGS[section], section)


def _sections() -> dict[str, dict[str, Any]]:
    """Return the keys and types of each section, from the classes that receive the values."""
    from peft import LoraConfig

    from activedpo_fast.selection.rules import PickRules
    from activedpo_fast.training.server import ServerGeneration
    from activedpo_fast.training.trl import dpo_config

    dpo = type(dpo_config())  # trl.DPOConfig, or an error that says how to install it
    return {
        "lora": _keys(LoraConfig, "lora"),
        "dpo": _keys(dpo, "dpo"),
        **{section: section_keys(section) for section in SETTINGS},
        "rules": _keys(PickRules, "rules"),
        "generation": {
            "model": str,
            **_options(ServerGeneration.__init__, without={"show_progress"}),
        },
    }


def _options(function: Any, without: Collection[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    return {
        name: hints.get(name, Any)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in without
    }


def _keys(cls: type, section: str) -> dict[str, Any]:
    """Return the keys and types of a section: the fields of its class without `_ELSEWHERE`."""
    hints = typing.get_type_hints(cls)
    names = [one.name for one in fields(cls) if one.init and one.name not in _ELSEWHERE[section]]
    return {name: hints.get(name, Any) for name in names}


_LABEL_STUDIO: dict[str, Any] = {"base_url": str, "api_key_env": str}
_NEEDED_BY_ORACLE = {
    "label_studio": {
        "base_url": "the address of Label Studio, such as http://localhost:8080",
        "api_key_env": "the environment variable that has your access token",
    },
    "reward_model": {"model": "the folder of the reward model"},
    "judge": {
        "model": "the name of the judge's model at its server",
        "base_url": "the address of the judge's server, such as http://localhost:8000/v1",
    },
}


_NEEDED_BY_GENERATION = {
    "base_url": "the address of the server that samples, such as http://localhost:8000/v1",
    "model": "the name of the base model at that server",
}
_SCORING = ("reward_model", "judge")  # kinds that score responses to held-out prompts


def _check_oracle(
    oracle: Mapping[str, Any], section: str = "oracle", kinds: Collection[str] = ()
) -> None:
    """Refuse wrong options of an oracle; `kinds`, if any, are those that it may be of."""
    from activedpo_fast.labels import JudgeOracle, RewardModelOracle

    known: dict[str, dict[str, Any]] = {
        "people": {
            "kind": str,
            "via": Literal["page", "files", "label_studio"],
            **(_LABEL_STUDIO if oracle.get("via") == "label_studio" else {}),
        },
        "reward_model": {
            "kind": str,
            "model": str,
            **_options(RewardModelOracle.__init__, without={"seed", "show_progress"}),
        },
        "judge": {
            "kind": str,
            "model": str,
            **_options(JudgeOracle.__init__, without={"journal", "show_progress"}),
        },
        "recorded": {"kind": str},
    }
    kind, known_kinds = oracle.get("kind"), kinds or known
    if not isinstance(kind, str) or kind not in known_kinds:
        raise ActiveDPOError(
            f"{section}.kind: expected one of {', '.join(known_kinds)}, got {short(kind)}"
        )
    check_keys(oracle, known[kind], section)
    needed = oracle["via"] if oracle.get("via") == "label_studio" else kind
    for name, what in _NEEDED_BY_ORACLE.get(needed, {}).items():
        if name not in oracle:
            raise ActiveDPOError(f"{section}.{name}: missing, {what}")


def _with_oracle(evaluate: Mapping[str, Any], oracle: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section evaluate, with what scores responses if it has prompts."""
    found = dict(evaluate)
    if found.get("oracle") is not None:
        _check_oracle(found["oracle"], "evaluate.oracle", _SCORING)
    elif found.get("prompts") is not None:
        if oracle["kind"] not in _SCORING:
            raise ActiveDPOError(
                "evaluate.oracle: missing, what scores the responses: kind reward_model, or judge "
                "for a win rate against the start"
            )
        found["oracle"] = dict(oracle)
    return found


def _with_responses(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section loop; recorded preferences are of given responses."""
    loop = dict(values.get("loop", {}))
    if values["oracle"]["kind"] == "recorded" and loop.setdefault("responses", "given") != "given":
        raise ActiveDPOError(
            "loop.responses: recorded preferences are of the responses that they were given for: "
            "leave it out, or say given"
        )
    if loop.get("responses") == "given":
        for name in SAMPLING:
            if name in loop:
                raise ActiveDPOError(f"loop.{name}: no response is sampled: remove it")
    return loop


def _check_reward(values: Mapping[str, Any]) -> None:
    """Require a reward model where rewards are needed, and refuse one where they are not."""
    from activedpo_fast.labels import RewardModel

    wanted = values.get("strategy") == "reward_gap"
    if "reward" not in values:
        if wanted and values["loop"].get("responses") != "given":
            raise ActiveDPOError(
                "reward: missing; the strategy reward_gap picks sampled responses by a reward "
                "model: give its folder as reward.model"
            )
        return
    if not wanted:
        raise ActiveDPOError("reward: only the strategy reward_gap uses one")
    without = {"show_progress"}
    check_keys(
        values["reward"], {"model": str, **_options(RewardModel.__init__, without)}, "reward"
    )
    if "model" not in values["reward"]:
        raise ActiveDPOError("reward.model: missing, the folder of the reward model")


def _check_generation(values: Mapping[str, Any]) -> None:
    generation = values.get("generation")
    if generation is None:
        return
    if values["loop"].get("responses") == "given":
        raise ActiveDPOError("generation: no response is sampled: remove it")
    for name, what in _NEEDED_BY_GENERATION.items():
        if name not in generation:
            raise ActiveDPOError(f"generation.{name}: missing, {what}")


def _check_rules(rules: Mapping[str, Any]) -> None:
    from activedpo_fast.selection.rules import PickRules

    try:
        PickRules(**rules)
    except ActiveDPOError as error:
        raise ActiveDPOError(f"rules: {error}") from None


def _check_settings(values: Mapping[str, Any]) -> None:
    """Refuse what the settings of the selector and the loop refuse, before anything is loaded."""
    for section, settings in SETTINGS.items():
        if section == "evaluate" and section not in values:
            continue
        needed = {"output_dir": values["output_dir"]} if section == "loop" else {}
        try:
            settings(**needed, **values.get(section, {}))
        except ActiveDPOError as error:
            raise ActiveDPOError(f"{section}.{error}") from None


def _move_template_kwargs(values: dict[str, Any]) -> None:
    """Merge the settings at the top level and in `selection` into one, in place."""
    name = "chat_template_kwargs"
    selection = dict(values.get("selection", {}))
    given = {name: values.get(name), f"selection.{name}": selection.pop(name, None)}
    values["selection"] = selection
    values[name] = one_setting(given)


def _with_preset(values: dict[str, Any]) -> dict[str, Any]:
    if "adapter" in values and "lora" in values:
        raise ActiveDPOError("adapter, lora: give one of them, not both")
    if "preset" in values:
        preset = find_preset(values["preset"])
        named = {"strategy": values["strategy"]} if "strategy" in values else {}
        selection = preset.selector_options({**values.get("selection", {}), **named})
        given = values["loop"].get("responses") == "given"
        loop = {k: v for k, v in preset.loop.items() if not (given and k in SAMPLING)}
        values = {
            **values,
            "strategy": selection.pop("strategy"),
            "selection": selection,
            "loop": {**loop, **values["loop"]},
            "dpo": {**preset.dpo, **values.get("dpo", {})},
        }
        if "adapter" not in values:
            values["lora"] = {**preset.lora, **values.get("lora", {})}
    if "adapter" not in values and "lora" not in values:
        raise ActiveDPOError(
            "adapter: missing; give an adapter's folder, or the section lora for a fresh one"
        )
    return values
