"""Which parameters belong to a model's last decoder layers, or to what runs after them.

Their gradient needs no backward pass below these layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.adapters import causal_lm, decoder_of
from activedpo_fast.models.encoder_decoder import is_encoder_decoder
from activedpo_fast.models.undisturbed import undisturbed


def decoder_layers(model: nn.Module, last: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the decoder layers below the `last` ones, and these.

    Raises:
        ActiveDPOError: no list of decoder layers is found, or it has fewer.
    """
    name = type(causal_lm(model)).__name__
    found = list(_outermost_lists(decoder_of(model)))
    if len(found) > 1:  # Gemma 3n has others
        config = causal_lm(model).config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        found = [layers for layers in found if len(layers) == config.num_hidden_layers]
    if len(found) != 1:
        raise ActiveDPOError(
            f"last_layers: {name} has no single list of decoder layers; leave last_layers out"
        )
    layers = list(found[0])
    if last > len(layers):
        raise ActiveDPOError(f"last_layers: {last}, and {name} has {len(layers)} decoder layers")
    return layers[:-last], layers[-last:]


def parameters_of_last_layers(model: nn.Module, count: int) -> set[int]:
    """Return the ids of the parameters that only the last `count` decoder layers have, or modules
    that run after the first of these begins, such as the final norm and the head.

    A weight that is also used below, as one that the head shares with the embedding, is not among
    them.

    Raises:
        ActiveDPOError: see `decoder_layers`.
    """
    lower, last = decoder_layers(model, count)
    above, within = _modules(last), _modules([*lower, *last])
    if any(
        parameter.requires_grad
        for module in model.modules()
        if id(module) not in within
        for parameter in module.parameters(recurse=False)
    ):
        above |= _run_after(model, last[0], within)
    above -= _modules(lower)  # a block that several layers share, as in Zamba, is below too
    below = {
        id(parameter)
        for module in model.modules()
        if id(module) not in above
        for parameter in module.parameters(recurse=False)
    }
    return {id(parameter) for parameter in model.parameters()} - below


def _modules(layers: list[nn.Module]) -> set[int]:
    return {id(module) for layer in layers for module in layer.modules()}


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            yield from _outermost_lists(child)
        elif len(child):
            yield child


def _run_after(model: nn.Module, layer: nn.Module, within: set[int]) -> set[int]:
    """Return the ids of modules outside the layers whose first call comes after that of `layer`.

    The order of a model's attributes does not tell: OPT's final norm stands before its layers. So
    one token runs through the model. What is never called, as a dictionary of parameters, counts as
    the modules around it: PEFT's tokens of a tied embedding are in the embedding and in the head.
    """
    called: dict[int, bool] = {}  # by module: whether `layer` was called before
    begun = False

    def on_call(module: nn.Module, args: object) -> None:
        nonlocal begun
        begun = begun or module is layer
        called.setdefault(id(module), begun)

    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    ids = {"input_ids": token}
    if is_encoder_decoder(model):
        ids["decoder_input_ids"] = token
    handles = [module.register_forward_pre_hook(on_call) for module in model.modules()]
    try:
        with undisturbed(model), torch.no_grad():
            model(**ids, attention_mask=torch.ones_like(token), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    before: set[int] = set()
    after: set[int] = set()

    def visit(module: nn.Module, around: bool) -> None:
        runs_after = called.get(id(module), around)
        (after if runs_after else before).add(id(module))
        for child in module.children():
            if id(child) not in within:
                visit(child, runs_after)

    visit(model, False)
    return after - before
