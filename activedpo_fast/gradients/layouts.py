"""How responses of a model are batched: what the self-check found, and remembers."""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

from torch import nn

from activedpo_fast.gradients.batches import Layout, group_rows
from activedpo_fast.gradients.self_check import forward_layout, gradient_layout
from activedpo_fast.gradients.trainable import trainable_linears
from activedpo_fast.models.positions import batch_changes_attention
from activedpo_fast.pool.tokens import TokenizedPool


class KnownLayouts:
    """The fastest layouts that are correct for a model's gradients, and for forward passes.

    The self-check runs when an answer is not known yet, and again for a pool with a response longer
    than all before, because models differ in how they treat long responses.

    Args:
        model: whose gradients are computed. pad_token_id, precision: see `FeatureExtractor`.
        verify: without it nothing is checked, and prompts are never shared.

    Raises (all methods):
        UnsupportedParameterError, ActiveDPOError: see `gradient_layout`.
    """

    def __init__(
        self, model: nn.Module, *, pad_token_id: int, precision: str | None, verify: bool
    ) -> None:
        self._model = model
        self._pad_token_id = pad_token_id
        self._precision = precision
        self._verify = verify
        # Each with the longest response it was determined with: for gradients by whether the pool
        # had prompts to share, otherwise by model.
        self._gradients: dict[bool, tuple[Layout, int]] = {}
        self._forward: WeakKeyDictionary[nn.Module, tuple[Layout, int]] = WeakKeyDictionary()

    def copy(self) -> KnownLayouts:
        """Return one that knows the same; what either finds out later is its own."""
        twin = copy.copy(self)
        twin._gradients, twin._forward = self._gradients.copy(), self._forward.copy()
        return twin

    def for_gradients(self, tokenized: TokenizedPool) -> Layout:
        """Return the layout for gradients of the model."""
        least = _fastest_allowed(self._model)
        if not self._verify:
            return Layout.slowest(Layout.WHOLE, least)
        rows = range(len(tokenized.sequences))
        has_prompts = any(group.shared for group in group_rows(tokenized, rows, Layout.SHARED))
        longest = _longest(tokenized)
        layout, checked = self._gradients.get(has_prompts, (Layout.SHARED, 0))
        if longest > checked:
            linears = trainable_linears(self._model)
            layout = gradient_layout(
                self._model, linears, tokenized, self._pad_token_id, self._precision
            )
            self._gradients[has_prompts] = layout, longest
        # The finding of either check also holds for the other.
        forward, _ = self._forward.get(self._model, (layout, 0))
        return Layout.slowest(layout, forward, least)

    def for_forward(self, tokenized: TokenizedPool, model: nn.Module) -> Layout:
        """Return the layout for log-probs and hidden states of `model`, which may be another."""
        least = _fastest_allowed(model)
        if not self._verify:
            return Layout.slowest(Layout.WHOLE, least)
        longest = _longest(tokenized)
        layout, checked = self._forward.get(model, (Layout.WHOLE, 0))
        if longest > checked:
            layout = forward_layout(model, tokenized, self._pad_token_id, self._precision)
            self._forward[model] = layout, longest
        found = [known for known, _ in self._gradients.values()] if model is self._model else []
        return Layout.slowest(layout, *found, least)


def _fastest_allowed(model: nn.Module) -> Layout:
    """Return the fastest layout allowed for this kind of model, whatever the self-check finds."""
    return Layout.ALONE if batch_changes_attention(model) else Layout.SHARED


def _longest(tokenized: TokenizedPool) -> int:
    return max((len(sequence.input_ids) for sequence in tokenized.sequences), default=0)
