"""Settings of the selector and of the loop: dataclasses that `trl.TrlParser` reads, like TRL's own.

Their names, defaults and help texts are those of the keyword options of `ActiveDPOSelector` and
`ActiveDPOLoop`, of the file of `activedpo run` and of the command line.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import typing
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from activedpo_fast._checks import check_at_least, describe, fits, nearest
from activedpo_fast._limits import check_limit
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.template import check_template_kwargs

logger = logging.getLogger(__name__)

StrategyName = Literal[
    "activedpo",
    "random",
    "apo",
    "aplp",
    "margin_small",
    "margin_large",
    "adpo_plus",
    "trace",
    "trace_plus",
    "reward_gap",
]
SketchName = Literal["sjlt", "rademacher", "kronecker", "none"]
Normalization = Literal["default", "response", "pair", "none"]
Truncation = Literal["keep_start", "keep_end"]
GradientOf = Literal["all_tokens", "response_tokens"]

Settings = TypeVar("Settings", "SelectorConfig", "LoopConfig")


@dataclass
class SelectorConfig:
    """Settings of `ActiveDPOSelector`: `args=SelectorConfig(...)`, or the same names as keywords.

    `trl.TrlParser` and `transformers.HfArgumentParser` read them from the command line and from
    YAML. There, mappings are JSON text.

    Raises:
        ActiveDPOError: a value of the wrong type or out of range, naming the setting.

    Examples:
        >>> from trl import TrlParser
        >>> from activedpo_fast import ActiveDPOSelector, SelectorConfig
        >>> parser = TrlParser(SelectorConfig)
        >>> (args,) = parser.parse_args_and_config(["--normalize", "pair", "--proj_dim", "1024"])
        >>> args.normalize, args.proj_dim, args.beta
        ('pair', 1024, 0.1)
        >>> picked = ActiveDPOSelector(model, args=args, processing_class=tokenizer).select(pool, 4)
    """

    strategy: StrategyName = field(
        default="activedpo", metadata={"help": "How pairs are chosen; README.md lists the methods."}
    )
    beta: float = field(
        default=0.1,
        metadata={
            "help": "β of DPO, in the implicit reward β log(π/π_ref); gradient rows are multiplied "
            "by it."
        },
    )
    length_normalized: bool = field(
        default=False,
        metadata={
            "help": "Use mean log-probs of a response's tokens, for losses that train them (ipo, "
            "sigmoid_norm)."
        },
    )
    gradient: GradientOf = field(
        default="all_tokens",
        metadata={
            "help": "Which tokens the weights act on in a gradient row. response_tokens takes the "
            "prompt's keys and values as constants: cheaper for long prompts, and not exact."
        },
    )
    last_layers: int | None = field(
        default=None,
        metadata={
            "help": "L, to take gradient rows of the trainable parameters in the last L decoder "
            "layers alone, and after them: cheaper, and not exact. With preselect this is about "
            "the first stage, and exact rows are of all. Default: of all."
        },
    )
    preselect: int | None = field(
        default=None,
        metadata={
            "help": "Pairs per pick that cheap rows (response_tokens) of the whole pool choose "
            "first; exact rows are computed for these alone, and decide. For activedpo and "
            "adpo_plus. Default: exact rows of the whole pool."
        },
    )
    sketch: SketchName = field(
        default="sjlt",
        metadata={"help": "Random projection of the gradients; none keeps them whole."},
    )
    proj_dim: int = field(
        default=8192, metadata={"help": "k, the length of a projected gradient row."}
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of random picks, and of the sketch when rows are computed."},
    )
    normalize: Normalization | None = field(
        default="default",
        metadata={
            "help": "What is scaled to unit norm: each response's gradient row (response), the "
            "difference of a pair's two rows (pair), or nothing (none). default is response for "
            "activedpo and none for adpo_plus; the other strategies do not scale."
        },
    )
    lam: float = field(
        default=1.0, metadata={"help": "λ of V = (λ/κ) I + Σ φφᵀ. The paper does not state it."}
    )
    kappa: float = field(default=1.0, metadata={"help": "κ of V."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt + response in tokens, as in DPOConfig."}
    )
    truncation_mode: Truncation = field(
        default="keep_start",
        metadata={"help": "Which end of longer sequences is kept, as in DPOConfig."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Arguments of the chat template, such as {"enable_thinking": false}; use those '
            "that you train with."
        },
    )
    strategy_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More options of the strategy, such as aplp's shortlist."}
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens, padding included, in one forward and backward pass. Default: as "
            "many as suit the device."
        },
    )
    bf16: bool = field(
        default=False,
        metadata={
            "help": "Matrix products of the features in bfloat16 (autocast), on devices that have "
            "it."
        },
    )
    verify: bool = field(
        default=True, metadata={"help": "Check the first gradients against autograd."}
    )

    def __post_init__(self) -> None:
        self.chat_template_kwargs = _parsed("chat_template_kwargs", self.chat_template_kwargs)
        self.strategy_options = as_mapping("strategy_options", self.strategy_options)
        check_template_kwargs(self.chat_template_kwargs)
        check_types(self)
        _check_positive(self, "beta", "lam", "kappa")
        check_at_least(0, seed=self.seed)
        check_at_least(
            1,
            last_layers=self.last_layers,
            preselect=self.preselect,
            proj_dim=self.proj_dim,
            max_tokens_per_batch=self.max_tokens_per_batch,
        )
        if self.preselect is not None and self.gradient != "all_tokens":
            raise ActiveDPOError(
                f"preselect: gradient is {self.gradient!r}, which the first stage uses anyway: "
                "leave one of the two out"
            )
        if self.max_length is not None and self.max_length < 2:
            raise ActiveDPOError(
                f"max_length: {self.max_length} leaves no token to score, 2 is the least"
            )

    @property
    def tokenization(self) -> dict[str, Any]:
        """The arguments of `tokenize_pool`."""
        names = ("max_length", "truncation_mode", "chat_template_kwargs")
        return {name: getattr(self, name) for name in names}

    @property
    def offered(self) -> dict[str, Any]:
        """Options for any strategy that has them (see `make_strategy`); its own defaults apply."""
        offered: dict[str, Any] = {name: getattr(self, name) for name in ("beta", "lam", "kappa")}
        if self.normalize != "default":
            offered["normalize"] = None if self.normalize == "none" else self.normalize
        return offered

    def warn_of_unused(self, strategy: str, options: Collection[str]) -> None:
        """Log which of the offered settings were changed though `strategy` has no such option."""
        for setting in fields(self):
            if setting.name not in ("lam", "kappa", "normalize") or setting.name in options:
                continue
            if (value := getattr(self, setting.name)) != setting.default:
                logger.warning(
                    "%s=%s has no effect: strategy %r has no such option",
                    setting.name,
                    value,
                    strategy,
                )


@dataclass
class LoopConfig:
    """Settings of `ActiveDPOLoop`: `args=LoopConfig(...)`, or the same names as keywords.

    Read by parsers as `SelectorConfig` is.

    Raises:
        ActiveDPOError: a value of the wrong type or out of range, naming the setting.

    Examples:
        >>> from activedpo_fast import ActiveDPOLoop, LoopConfig
        >>> from activedpo_fast.labels import CallableOracle
        >>> oracle = CallableOracle(lambda prompt, a, b: int(len(b) < len(a)))
        >>> args = LoopConfig(output_dir="run", rounds=1, batch_size=2, max_completion_length=8)
        >>> loop = ActiveDPOLoop(model, tokenizer, prompts, oracle, args=args, dpo_args=dpo_args)
        >>> [record.labels_total for record in loop.run()]
        [0, 2]
    """

    output_dir: str | Path = field(
        metadata={"help": "Folder of the run, from which it continues when interrupted."}
    )
    strategy: StrategyName = field(
        default="activedpo", metadata={"help": "How pairs are chosen; README.md lists the methods."}
    )
    selector_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Settings of SelectorConfig. β, the lengths and length_normalized are those of "
            "the DPOConfig unless given."
        },
    )
    rounds: int = field(default=5, metadata={"help": "Rounds of the run; may be raised later."})
    batch_size: int = field(
        default=50, metadata={"help": "How many pairs a round picks and has labeled."}
    )
    prompts_per_round: int = field(
        default=1000,
        metadata={"help": "How many prompts get responses in a round; all, if there are fewer."},
    )
    responses: Literal["sampled", "given"] = field(
        default="sampled",
        metadata={
            "help": "Sampled from the current model in every round, or given: the prompts are rows "
            "of a pool, of which a round offers prompts_per_round."
        },
    )
    num_generations: int = field(
        default=3, metadata={"help": "M, the responses per prompt: M (M − 1) / 2 candidate pairs."}
    )
    max_completion_length: int = field(default=64, metadata={"help": "Longest response in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the likeliest tokens with this probability."}
    )
    generation_batch_size: int = field(
        default=16, metadata={"help": "How many responses are generated at once."}
    )
    max_attempts: int = field(
        default=4,
        metadata={
            "help": "How often responses that are empty or repeat another one are sampled again, "
            "the first time included."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Arguments of the chat template, such as {"enable_thinking": false}, for '
            "generating, selecting and training."
        },
    )
    train_on: Literal["all", "newest"] = field(
        default="all",
        metadata={"help": "Labels that a round trains on. The paper does not state it."},
    )
    start_from: Literal["initial", "current"] = field(
        default="initial",
        metadata={"help": "Adapter that a round trains from. The paper does not state it."},
    )
    reference: Literal["initial", "round"] = field(
        default="initial",
        metadata={
            "help": "π_ref: the initial policy, or the one that the round's training starts from. "
            "The paper does not state it."
        },
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of the order of the prompts and, with the round, of responses."},
    )

    def __post_init__(self) -> None:
        self.chat_template_kwargs = _parsed("chat_template_kwargs", self.chat_template_kwargs)
        self.selector_options = as_mapping("selector_options", self.selector_options)
        check_template_kwargs(self.chat_template_kwargs)
        check_types(self)
        check_at_least(0, seed=self.seed)
        check_at_least(
            1,
            rounds=self.rounds,
            batch_size=self.batch_size,
            prompts_per_round=self.prompts_per_round,
        )
        check_sampling(**self.sampling)
        for option in fields(self):
            unlike = getattr(self, option.name) != option.default
            if self.responses == "given" and option.name in SAMPLING and unlike:
                raise ActiveDPOError(
                    f"{option.name}: with responses 'given' no response is sampled: leave it out"
                )

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate_responses`."""
        return {name: getattr(self, name) for name in SAMPLING}


SAMPLING = (
    "num_generations",
    "max_completion_length",
    "temperature",
    "top_p",
    "generation_batch_size",
    "max_attempts",
)


# What the selector and the loop take beside their settings, for misspelled ones.
_ARGUMENTS: dict[type, tuple[str, ...]] = {
    SelectorConfig: ("processing_class", "args", "preset", "ref_model", "peft_config"),
    LoopConfig: (
        "processing_class",
        "args",
        "dpo_args",
        "rules",
        "generate",
        "evaluate",
        "eval_dataset",
        "callbacks",
        "peft_config",
        "extra_settings",
        "show_progress",
    ),
}


def read_settings(
    kind: type[Settings], args: Settings | None, options: Mapping[str, Any], strategy: Any
) -> tuple[Settings, Any]:
    """Return settings, from `args` or from keyword options, and the strategy.

    `args` is copied, and checked again: its fields may have been set since it was made, and may be
    set later.

    Args:
        strategy: a name, which is one of the options; an object, which comes beside the settings
            and replaces theirs; or None for theirs.

    Raises:
        ActiveDPOError: settings are given twice, or `args` is something else; an unknown option; a
            required one is missing; what the settings refuse.
    """
    own = strategy is not None and not isinstance(strategy, str)
    if strategy is not None and not own:
        options = {"strategy": strategy, **options}
    if args is None:
        args = from_options(kind, options)
    elif not isinstance(args, kind):
        raise ActiveDPOError(f"args: expected a {kind.__name__}, got {type(args).__name__}")
    elif options:
        raise ActiveDPOError(
            f"{', '.join(options)}: settings are given twice, in args too; put all of them into "
            "args, or leave args out"
        )
    else:
        args = replace(args)
    return args, strategy if own else args.strategy


def from_options(kind: type[Settings], options: Mapping[str, Any]) -> Settings:
    """Return settings from keyword options; `ActiveDPOError` for an unknown or a missing one."""
    known = [option.name for option in fields(kind)]
    for name in options:
        if name not in known:
            raise ActiveDPOError(f"{name}: unknown option; {_hint(kind, name, known)}")
    if kind is LoopConfig and "output_dir" not in options:
        raise ActiveDPOError("output_dir: missing, the folder of the run")
    return kind(**options)


def _hint(kind: type, name: str, known: list[str]) -> str:
    if name == "tokenizer":
        return "as in TRL, it is called processing_class"
    if kind is LoopConfig and name in {option.name for option in fields(SelectorConfig)}:
        return f"a setting of the selector: selector_options={{{name!r}: ...}}"
    if kind is SelectorConfig and name == "rules":
        return "they are an argument of select"
    return nearest(name, [*known, *_ARGUMENTS[kind]], f"known: {', '.join(sorted(known))}")


def check_sampling(
    *,
    num_generations: int,
    max_completion_length: int,
    temperature: float,
    top_p: float,
    generation_batch_size: int,
    max_attempts: int,
) -> None:
    """Raise `ActiveDPOError`, naming the argument, for what `generate_responses` cannot do."""
    check_at_least(2, num_generations=num_generations)
    check_limit("responses", num_generations, "num_generations", "responses to one prompt")
    check_at_least(
        1,
        max_completion_length=max_completion_length,
        generation_batch_size=generation_batch_size,
        max_attempts=max_attempts,
    )
    if not 0 < temperature < math.inf:  # nor NaN
        raise ActiveDPOError(f"temperature: {temperature} is not above 0 and finite")
    if not 0 < top_p <= 1:
        raise ActiveDPOError(f"top_p: {top_p} is not in (0, 1]")


def check_responding(*, temperature: float, top_p: float, samples: int = 1) -> None:
    """Raise `ActiveDPOError`, naming the argument, for what `respond` cannot do."""
    if temperature == 0 and samples > 1:
        raise ActiveDPOError(f"samples: at temperature 0 all {samples} are the same: leave it out")
    if not 0 <= temperature < math.inf:  # nor NaN
        raise ActiveDPOError(f"temperature: {temperature} is not a finite number from 0")
    if not 0 < top_p <= 1:
        raise ActiveDPOError(f"top_p: {top_p} is not in (0, 1]")


def as_mapping(name: str, value: Any) -> Any:
    """Return the mapping that JSON text stands for, which is what a command line has.

    A mapping is copied: the caller's may change later. None and "null" are None.

    Raises:
        ActiveDPOError: anything else, naming the setting.
    """
    found = _parsed(name, value)
    if found is not None and not (
        isinstance(found, dict) and all(isinstance(key, str) for key in found)
    ):
        raise ActiveDPOError(f"{name}: expected a section of keys or null, got {found!r}")
    return found


def _parsed(name: str, value: Any) -> Any:
    """Return what JSON text stands for, or a copy of any other value."""
    if not isinstance(value, str):
        return deepcopy(value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ActiveDPOError(f"{name}: not JSON ({error}): {value!r}") from None


def check_types(settings: Any) -> None:
    """Raise `ActiveDPOError` for the first field of a dataclass that is not of its type."""
    hints = typing.get_type_hints(type(settings))
    for option in fields(settings):
        value = getattr(settings, option.name)
        if not fits(value, hints[option.name]):
            raise ActiveDPOError(
                f"{option.name}: expected {describe(hints[option.name])}, got {value!r}"
            )


def _check_positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not 0 < value <= sys.float_info.max:  # nor NaN
            raise ActiveDPOError(f"{name}: {value!r} is not positive and finite")
