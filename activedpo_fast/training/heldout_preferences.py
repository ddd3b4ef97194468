"""How the policy's implicit reward agrees with held-out preferences, after each round of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from activedpo_fast._files import FilePath
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.labels import RecordedOracle
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.template import template_kwargs
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection
from activedpo_fast.settings import SelectorConfig
from activedpo_fast.training.heldout import PREFERENCES, Values, standard_error, write_heldout

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class HeldoutPreferences:
    """How well the policy's implicit reward agrees with held-out preferences; nothing is sampled.

    The implicit reward is r = β log(π/π_ref), and π_ref the policy at the start: whichever
    reference the rounds train against, their values can be compared. The log-probs are kept in
    `heldout-preferences.json` of the start's folder and of each round's.

    A call returns `accuracy`, the share of pairs with r(chosen) > r(rejected), where equal ones
    count as half, as all do at the start; `margin`, the mean of r(chosen) − r(rejected); and
    `accuracy_se` and `margin_se`, their standard errors over the pairs.

    Args:
        source: rows with `prompt`, `chosen` and `rejected`, as in `RecordedOracle`; repeated pairs
            count once.
        output_dir, processing_class: as in `HeldoutReward`.
        settings: β, the lengths, `length_normalized`, the template's arguments and
            `max_tokens_per_batch`: give those that the selector has. Pairs whose prompt fills
            `max_length`, which the trainer leaves out, are left out here.

    Raises:
        ActiveDPOError: a bad row, which is named, or no pair that is not left out.

    Examples:
        >>> from activedpo_fast import SelectorConfig
        >>> from activedpo_fast.training.heldout_preferences import HeldoutPreferences
        >>> rows = [
        ...     {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " Go away."},
        ...     {"prompt": "Name a color.", "chosen": " Red.", "rejected": " Dog."},
        ... ]
        >>> evaluate = HeldoutPreferences(
        ...     rows, output_dir="run", processing_class=tokenizer,
        ...     settings=SelectorConfig(beta=0.1))
        >>> evaluate(model)  # at the start
        {'accuracy': 0.5, 'accuracy_se': 0.0, 'margin': 0.0, 'margin_se': 0.0}
    """

    def __init__(
        self,
        source: FilePath | datasets.Dataset | Sequence[Mapping[str, Any]] | RecordedOracle,
        *,
        output_dir: FilePath,
        processing_class: PreTrainedTokenizerBase,
        settings: SelectorConfig,
        show_progress: bool | None = None,
    ) -> None:
        recorded = source if isinstance(source, RecordedOracle) else RecordedOracle(source)
        pool = recorded.pool
        tokens = _tokenized(pool, processing_class, settings, show_progress)
        if tokens.skipped:
            pool = _without(pool, tokens.skipped, settings.max_length)
            tokens = _tokenized(pool, processing_class, settings, show_progress)
        self._tokens = tokens
        self._chosen = np.array(recorded.label(all_pairs(pool)))
        self._options = settings
        self._pad = processing_class.pad_token_id
        self._output_dir = Path(output_dir)
        self._show_progress = show_progress
        self.settings = {
            "preferences": {
                "pairs": recorded.preferences,
                "beta": settings.beta,
                "length_normalized": settings.length_normalized,
                **settings.tokenization,
            }
        }

    def __call__(self, model: PeftModel) -> dict[str, float]:
        logps = self._logps(model)
        found = {"logps": logps.tolist()}
        start = np.array(write_heldout(self._output_dir, PREFERENCES, found)["logps"])
        rewards = self._options.beta * (logps - start)
        rows = np.arange(len(rewards))
        margins = rewards[rows, self._chosen] - rewards[rows, 1 - self._chosen]
        agreed = (margins > 0) + (margins == 0) / 2
        return {
            "accuracy": float(agreed.mean()),
            "accuracy_se": standard_error(agreed),
            "margin": float(margins.mean()),
            "margin_se": standard_error(margins),
        }

    def _logps(self, model: PeftModel) -> Values:
        """Return log π(y|x) of the two responses of each pair, [P, 2]."""
        extractor = FeatureExtractor(
            model,
            Sketch("sjlt", 8),  # of gradients, which are not taken
            length_normalized=self._options.length_normalized,
            pad_token_id=0 if self._pad is None else self._pad,
            max_tokens_per_batch=self._options.max_tokens_per_batch,
            precision="bf16" if self._options.bf16 else None,
            verify=False,
        )
        logps = extractor.logps(self._tokens, show_progress=self._show_progress)
        return np.asarray(logps.view(-1, 2).numpy(), dtype=np.float64)


def _tokenized(
    pool: PreferencePool,
    processing_class: PreTrainedTokenizerBase,
    settings: SelectorConfig,
    show_progress: bool | None,
) -> TokenizedPool:
    return tokenize_pool(
        pool, processing_class, show_progress=show_progress, **settings.tokenization
    )


def _without(
    pool: PreferencePool, skipped: Sequence[int], max_length: int | None
) -> PreferencePool:
    kept = sorted(set(range(len(pool))) - set(skipped))
    if not kept:
        raise ActiveDPOError(f"the prompt of every pair fills max_length={max_length}")
    logger.warning(
        "%d of %d held-out pairs are left out: their prompt fills max_length=%s",
        len(skipped),
        len(pool),
        max_length,
    )
    return pool.subset(kept)


def all_pairs(
    pool: PreferencePool, chat_template_kwargs: Mapping[str, Any] | None = None
) -> Selection:
    """Return the pair of each item of a pool whose items have two responses, scored 0."""
    picks = []
    for n, item in enumerate(pool):
        first, second = item.responses
        arguments = template_kwargs(item.extra, chat_template_kwargs) if pool.is_chat else None
        picks.append(Pick(item.id, (0, 1), 0.0, n, item.prompt, (first, second), arguments or None))
    return Selection(tuple(picks), "heldout")
