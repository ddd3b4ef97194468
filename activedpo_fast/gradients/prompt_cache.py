"""One forward pass for a prompt, continued by each of its responses.

A response needs only the keys and values of the prompt's tokens. They are kept in a transformers
cache, as `generate` does, but with their autograd graph, so that gradients reach them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer


class _PromptDone(Exception):
    """The last layer's keys and values are recorded; responses need nothing after them."""


class _Recorder(DynamicLayer):
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class _RecordingCache(Cache):
    """A cache that records one forward pass's keys and values and ends it after the last layer."""

    def __init__(self, layers: int) -> None:
        super().__init__(layer_class_to_replicate=_Recorder)
        self._last = layers - 1

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._last:
            raise _PromptDone
        return states


class _Continued(DynamicLayer):
    """A prompt's keys and values, once for each response; later ones are never stored."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )


def run_prompts(
    decoder: nn.Module, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor
) -> list[torch.Tensor]:
    """Return keys and values, alternating, of every layer for left-padded prompts [P, L].

    Each is [P, heads, L, head_dim] and part of the autograd graph.
    """
    cache = _RecordingCache(decoder.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]
    try:
        decoder(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
    except _PromptDone:
        pass
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        assert isinstance(layer, _Recorder) and layer.keys is not None
        assert layer.values is not None
        found += [layer.keys, layer.values]
    return found


def continue_prompts(states: list[torch.Tensor]) -> Cache:
    """Return a cache that starts with `states`: alternating keys and values, a row per response."""
    return Cache(
        layers=[
            _Continued(keys, values) for keys, values in zip(states[::2], states[1::2], strict=True)
        ]
    )
