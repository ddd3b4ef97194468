"""The settings of a run as JSON values, which its folder records and a resumed run compares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from activedpo_fast.labels import Oracle
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.template import own_template_kwargs
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.selection.strategies import Strategy
from activedpo_fast.settings import LoopConfig

if TYPE_CHECKING:
    import datasets
    from trl import DPOConfig


def recorded_settings(
    args: LoopConfig,
    dpo_args: DPOConfig,
    *,
    model: str,
    strategy: str | Strategy,
    selector_options: Mapping[str, Any],
    chat_template_kwargs: Mapping[str, Any] | None,
    prompts: Sequence[Prompt],
    rules: PickRules | None,
    oracle: Oracle,
    evaluate: Any,
    generate: Any,
    eval_dataset: datasets.Dataset | None,
    extra_settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything that a run depends on, except the model and the tokenizer.

    `rounds` is left out: it may be raised. So are folders, and a model's name is only informative.
    """
    dpo = {
        name: value
        for name, value in dpo_args.to_dict().items()
        if name not in ("output_dir", "logging_dir", "run_name")
    }
    dpo["pad_token"] = dpo_args.pad_token  # `to_dict` masks it like a secret
    settings: dict[str, Any] = asdict(args)
    for name in ("output_dir", "rounds"):
        del settings[name]
    settings |= {
        "model": model,
        "strategy": (
            strategy
            if isinstance(strategy, str)
            else {"name": strategy.name, **{k: _described(v) for k, v in vars(strategy).items()}}
        ),
        "selector_options": selector_options,
        "chat_template_kwargs": chat_template_kwargs,
        "prompts": digest(
            [prompt_identity(prompt, given=args.responses == "given") for prompt in prompts]
        ),
        "rules": rules and {**asdict(rules), "exclude": digest(sorted(rules.exclude))},
        "dpo": dpo,
        "oracle": object_settings(oracle),
        "eval_dataset": None if eval_dataset is None else digest(eval_dataset.to_list()),
        "generate": None if generate is None else object_settings(generate),
        "evaluate": getattr(evaluate, "settings", None),
        "extra_settings": extra_settings,
    }
    recorded: dict[str, Any] = plain(settings)
    return recorded


def plain(value: Any) -> Any:
    """Return `value` after a JSON round trip; objects (a reference model) become type names."""
    return json.loads(json.dumps(value, default=lambda other: type(other).__name__))


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _described(option: Any) -> Any:
    """Return an option of a strategy as it is, or what is known of a function or an object."""
    return object_settings(option) if callable(option) else option


def object_settings(given: Any) -> dict[str, Any]:
    """Return the class of an object, and its public attributes that are numbers or texts."""
    own = {
        name: value
        for name, value in getattr(given, "__dict__", {}).items()
        if not name.startswith("_") and isinstance(value, (int, float, str, type(None)))
    }
    return {"class": type(given).__name__, **own}


def prompt_identity(prompt: Any, *, given: bool = False) -> list[Any]:
    """Return the id of a prompt and everything its tokens, or those of its pairs, depend on."""
    own = None if isinstance(prompt.prompt, str) else own_template_kwargs(prompt.extra)
    responses = [prompt.responses] if given else []
    return [prompt.id, prompt.prompt, *responses, *([] if own is None else [own])]
