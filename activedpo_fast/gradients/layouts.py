"""How gradients are computed and responses are batched: what the self-check found, remembered."""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from activedpo_fast.errors import UnsupportedParameterError
from activedpo_fast.gradients.batches import Layout, group_rows
from activedpo_fast.gradients.self_check import forward_layout, gradient_layout
from activedpo_fast.gradients.trainable import TrainableParameters
from activedpo_fast.models.positions import batch_changes_attention
from activedpo_fast.pool.tokens import TokenizedPool

logger = logging.getLogger(__name__)


class HowGradients(NamedTuple):
    """How gradients are computed.

    layout: `ALONE` without hooks. by_hooks: captured by hooks; otherwise from autograd.
    """

    layout: Layout
    by_hooks: bool


BY_AUTOGRAD = HowGradients(Layout.ALONE, by_hooks=False)


class KnownLayouts:
    """The fastest layouts that are correct for a model's gradients, and for forward passes.

    The self-check runs when an answer is not known yet, and again for a pool with a response longer
    than all before, because models differ in how they treat long responses. That of gradients is
    about the parameters whose gradients are asked for.

    Args:
        model: whose gradients are computed. pad_token_id, precision: see `FeatureExtractor`.
        verify: without it nothing is checked, and prompts are never shared.
    """

    def __init__(
        self, model: nn.Module, *, pad_token_id: int, precision: str | None, verify: bool
    ) -> None:
        self._model = model
        self._pad_token_id = pad_token_id
        self._precision = precision
        self._verify = verify
        # Each with the longest response it was determined with: for gradients by parameters and
        # whether the pool had prompts to share, and images; otherwise by model.
        self._gradients: dict[tuple[frozenset[str], bool, bool], tuple[Layout, int]] = {}
        self._forward: WeakKeyDictionary[nn.Module, tuple[Layout, int]] = WeakKeyDictionary()
        self._failed: set[frozenset[str]] = set()  # parameters with which the check failed
        self._said = ""  # why gradients are from autograd, as last logged

    def copy(self) -> KnownLayouts:
        """Return one that knows the same; what either finds out later is its own."""
        twin = copy.copy(self)
        twin._gradients, twin._forward = self._gradients.copy(), self._forward.copy()
        twin._failed = self._failed.copy()
        return twin

    def for_gradients(self, tokenized: TokenizedPool, trained: TrainableParameters) -> HowGradients:
        """Return how to compute gradients of `trained`; log it if autograd has to.

        Hooks cannot capture gradients of other parameters than those of linear layers, nor those
        for which the self-check fails. One pass of autograd then gives all of them.
        """
        if trained.others:
            self._say_by_autograd(trained.describe_others(), tokenized)
            return BY_AUTOGRAD
        least = _fastest_allowed(self._model, tokenized)
        if not self._verify:
            return HowGradients(Layout.slowest(Layout.WHOLE, least), by_hooks=True)
        names = frozenset(trained.by_name)
        if names in self._failed:
            return BY_AUTOGRAD
        rows = range(len(tokenized.sequences))
        has_prompts = any(group.shared for group in group_rows(tokenized, rows, Layout.SHARED))
        longest = _longest(tokenized)
        kind = names, has_prompts, tokenized.has_images
        layout, checked = self._gradients.get(kind, (Layout.SHARED, 0))
        if longest > checked:
            try:
                layout = gradient_layout(
                    self._model,
                    trained,
                    tokenized,
                    self._pad_token_id,
                    self._precision,
                    fastest=Layout.ALONE if tokenized.has_images else Layout.SHARED,
                )
            except UnsupportedParameterError as error:
                self._failed.add(names)
                self._say_by_autograd(str(error), tokenized)
                return BY_AUTOGRAD
            self._gradients[kind] = layout, longest
        # The finding of either check also holds for the other.
        forward, _ = self._forward.get(self._model, (layout, 0))
        return HowGradients(Layout.slowest(layout, forward, least), by_hooks=True)

    def _say_by_autograd(self, why: str, tokenized: TokenizedPool) -> None:
        if why == self._said:
            return
        self._said = why
        logger.warning(
            "gradients are from autograd, one response at a time, which is exact and slower: about "
            "%.1f times the operations of captured gradients, and no batches (%s)",
            _times_the_operations(tokenized),
            why,
        )

    def for_forward(self, tokenized: TokenizedPool, model: nn.Module) -> Layout:
        """Return the layout for log-probs and hidden states of `model`, which may be another."""
        longest = _longest(tokenized)
        least = _fastest_allowed(model, tokenized)
        if not self._verify or tokenized.has_images:
            return Layout.slowest(Layout.WHOLE, least)
        layout, checked = self._forward.get(model, (Layout.WHOLE, 0))
        if longest > checked:
            layout = forward_layout(model, tokenized, self._pad_token_id, self._precision)
            self._forward[model] = layout, longest
        known = self._gradients.items() if model is self._model else ()
        found = [layout for (_, _, images), (layout, _) in known if not images]
        return Layout.slowest(layout, *found, least)


def _fastest_allowed(model: nn.Module, tokenized: TokenizedPool) -> Layout:
    """Return the fastest layout allowed for this kind of model and for these prompts, whatever the
    self-check finds."""
    alone = tokenized.has_images or batch_changes_attention(model, _longest(tokenized))
    return Layout.ALONE if alone else Layout.SHARED


def _times_the_operations(tokenized: TokenizedPool) -> float:
    """Return the operations of one pass for each response, relative to those of shared prompts.

    A token costs as much forward as backward. A shared prompt runs forward once, and backward once
    for each of its responses.
    """
    lengths = [len(sequence.input_ids) for sequence in tokenized.sequences]
    groups = group_rows(tokenized, range(len(lengths)), Layout.SHARED)
    saved = sum((len(group.rows) - 1) * group.shared for group in groups)
    return 2 * sum(lengths) / max(2 * sum(lengths) - saved, 1)


def _longest(tokenized: TokenizedPool) -> int:
    return max((len(sequence.input_ids) for sequence in tokenized.sequences), default=0)
