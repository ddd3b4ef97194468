"""The section `evaluate` of a run file: its files read, and the metrics made of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from activedpo_fast.cli.evaluation_config import EvaluationConfig
from activedpo_fast.cli.run_file import RunConfig
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import Oracle, RecordedOracle, RewardOracle
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.reading import read_prompts
from activedpo_fast.pool.texts import canonical_json
from activedpo_fast.settings import LoopConfig, SelectorConfig
from activedpo_fast.training.evaluation import Evaluations, HeldoutReward, HeldoutWinRate
from activedpo_fast.training.heldout_preferences import HeldoutPreferences, all_pairs
from activedpo_fast.training.server import ServerGeneration
from activedpo_fast.training.trl import selector_settings

if TYPE_CHECKING:
    import datasets
    from trl import DPOConfig

logger = logging.getLogger(__name__)


class HeldoutData(NamedTuple):
    """What the files of the section hold; None for a file that is not given."""

    prompts: list[Prompt] | None
    preferences: RecordedOracle | None


def read_heldout(config: RunConfig, prompts: Sequence[Any]) -> HeldoutData:
    """Read the held-out files, and warn of prompts that are also among the run's `prompts`."""
    if config.evaluate is None:
        return HeldoutData(None, None)
    settings = EvaluationConfig(**config.evaluate)
    heldout, preferences = None, None
    if settings.prompts is not None:
        with named("evaluate.prompts"):
            heldout = read_prompts(settings.prompts)
        _warn_of_shared(heldout, prompts, "prompts")
    if settings.preferences is not None:
        with named("evaluate.preferences"):
            preferences = RecordedOracle(settings.preferences)
        _warn_of_shared(list(preferences.pool), prompts, "preferences")
    return HeldoutData(heldout, preferences)


def make_evaluation(
    config: RunConfig,
    data: HeldoutData,
    oracle: Oracle | None,
    generate: ServerGeneration | None,
    processing_class: PreTrainedTokenizerBase,
    dpo_args: DPOConfig,
    show_progress: bool | None,
) -> Evaluations | None:
    """Return the `evaluate` of the run's loop; None if the file has no such section.

    Args:
        oracle: scores responses to the held-out prompts; with a reward, by it.
        generate: samples them if it does so from the current policy.
    """
    if config.evaluate is None:
        return None
    output = Path(config.output_dir)
    loop = LoopConfig(output_dir=output, **config.loop)
    common: dict[str, Any] = {"output_dir": output, "processing_class": processing_class}
    parts: list[Any] = []
    with named("evaluate"):
        if data.prompts is not None and oracle is not None:
            options = {
                **EvaluationConfig(**config.evaluate).responding(loop),
                "chat_template_kwargs": config.chat_template_kwargs,
                "generate": generate if generate is not None and generate.load_adapter else None,
                "show_progress": show_progress,
            }
            parts.append(
                HeldoutReward(data.prompts, oracle.reward, **common, **options)
                if isinstance(oracle, RewardOracle)
                else HeldoutWinRate(data.prompts, oracle, **common, **options)
            )
        if data.preferences is not None:
            settings = SelectorConfig(
                **{
                    **selector_settings(dpo_args),
                    "chat_template_kwargs": config.chat_template_kwargs,
                    **{name: config.selection[name] for name in _SHARED & config.selection.keys()},
                }
            )
            parts.append(
                HeldoutPreferences(
                    data.preferences, settings=settings, show_progress=show_progress, **common
                )
            )
    return Evaluations(parts)


def trainer_dataset(
    config: RunConfig, data: HeldoutData, dpo_args: DPOConfig
) -> datasets.Dataset | None:
    """Return the held-out pairs if the trainer is to evaluate on them, by `dpo.eval_strategy`."""
    if data.preferences is None or dpo_args.eval_strategy == "no":
        return None
    pairs = all_pairs(data.preferences.pool, config.chat_template_kwargs)
    return pairs.to_dataset(data.preferences.label(pairs))


_SHARED = {"max_tokens_per_batch", "bf16"}  # settings of the selection that log-probs have, too


@contextmanager
def named(place: str) -> Iterator[None]:
    """Have an error begin with the part of the run file that it is about."""
    try:
        yield
    except ActiveDPOError as error:
        raise ActiveDPOError(f"{place}: {error}") from None


def _warn_of_shared(heldout: Sequence[Any], prompts: Sequence[Any], key: str) -> None:
    known = {canonical_json(prompt.prompt) for prompt in prompts}
    shared = sum(canonical_json(prompt.prompt) in known for prompt in heldout)
    if shared:
        logger.warning(
            "evaluate.%s: %d of %d are prompts of the run, too, and so not held out",
            key,
            shared,
            len(heldout),
        )
