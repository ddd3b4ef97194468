"""Models whose position embeddings depend on the longest sequence of a call.

RoPE of the types "longrope" (Phi-3, Phi-3.5, Phi-4-mini) and "dynamic" chooses its frequencies by
the longest position of a forward pass. log π(y|x) then depends on the other sequences in the batch,
and with "dynamic" also on earlier passes. The reference is a sequence run alone in a freshly loaded
model. A batch gives the same result if all of its sequences, and the prompts that they continue,
have the same length class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Maps a number of tokens to a length class: sequences of one class use the same frequencies.
LengthClass = Callable[[int], int]


def length_class(model: nn.Module) -> LengthClass | None:
    """Return the length classes of `model`; None if it embeds all lengths the same way."""
    thresholds: set[int] = set()
    dynamic: list[int] = []
    for module, layer_type, kind in _varying(model.modules()):
        if kind == "dynamic":
            dynamic.append(module.original_max_seq_len)
        else:
            thresholds.add(_parameters(module, layer_type)["original_max_position_embeddings"])
    if not thresholds and not dynamic:
        return None
    first_dynamic = min(dynamic, default=None)

    def classify(length: int) -> int:
        if first_dynamic is not None and length > first_dynamic:
            return length  # every length has its own frequencies
        return -sum(length > threshold for threshold in thresholds)

    return classify


def batch_changes_attention(model: nn.Module, longest: int) -> bool:
    """Return whether the keys that a token attends to depend on the batch it is in.

    Doge keeps a number of keys per batch. Sparse attention with an indexer (DeepSeek-V3.2, GLM)
    keeps the `index_topk` best keys of each token. Which of equal ones are kept depends on padding,
    and among nearly equal ones on rounding; fewer tokens than that are all kept.

    Args:
        longest: tokens of the longest sequence.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "keep_window_size", None) is not None:
            return True
        if type(module).__name__.endswith("Indexer"):
            kept = getattr(module, "index_topk", None)
            if isinstance(kept, int) and longest > kept:
                return True
    return False


@contextmanager
def fresh_positions(model: nn.Module) -> Iterator[None]:
    """Reset position embeddings to those of a freshly loaded model; restore them afterward.

    "dynamic" keeps the frequencies of the longest sequence so far for later sequences, too. Qwen's
    vision-language models keep how far the positions of the last prompt's images were apart.
    """
    modules = list(model.modules())
    varying = list(_varying(modules))
    embeddings = {id(module): module for module, _, _ in varying}.values()
    # Buffers are replaced by some forward passes and written to by others.
    before = [
        (
            module,
            dict(vars(module)),
            dict(module._buffers),
            [(buffer, buffer.clone()) for buffer in module._buffers.values() if buffer is not None],
        )
        for module in embeddings
    ]
    for module, layer_type, kind in varying:
        prefix = "" if layer_type is None else f"{layer_type}_"
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if original is not None:
            now = module._buffers[f"{prefix}inv_freq"]
            # If the original is not a buffer, it did not move with the model.
            module._buffers[f"{prefix}inv_freq"] = original.clone().to(now.device)
        if kind == "dynamic":
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
    remembered: list[tuple[Any, Any]] = [
        (module, module.rope_deltas) for module in modules if "rope_deltas" in vars(module)
    ]
    for module, _ in remembered:
        module.rope_deltas = None
    try:
        yield
    finally:
        for module, deltas in remembered:
            module.rope_deltas = deltas
        for module, attributes, buffers, values in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)


def _varying(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, str | None, str]]:
    """Yield (module, layer type or None, "dynamic" or "longrope") if embeddings vary by length."""
    for module in modules:
        # Not getattr: for a missing attribute, modules search their parameters and raise an error.
        rope_type = vars(module).get("rope_type")
        # Models with several layer types have a RoPE for each.
        types = rope_type if isinstance(rope_type, dict) else {None: rope_type}
        for layer_type, name in types.items():
            if not isinstance(name, str):
                continue
            if "dynamic" in name:
                yield module, layer_type, "dynamic"
            # PhiMoE scales by the length for any type.
            elif name == "longrope" or "long_mscale" in _parameters(module, layer_type):
                yield module, layer_type, "longrope"


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters = getattr(module.config, "rope_parameters", None) or {}
    return parameters if layer_type is None else parameters.get(layer_type) or {}
