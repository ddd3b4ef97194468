"""Forward and backward passes over a batch, with or without shared prompts.

Two layouts give the same numbers. `shared`: the prompts run once, the responses continue them, and
the LM head runs only on scored tokens. Not `shared`: every response is a separate sequence and goes
through the whole model as in a training step, which any causal LM supports. With an encoder, the
prompts are what it reads, and the responses what the decoder does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from activedpo_fast.errors import ActiveDPOError, UnsupportedParameterError
from activedpo_fast.gradients.batches import Batch
from activedpo_fast.gradients.encoder_decoder import (
    decoder_inputs,
    encode_prompts,
    head_inputs,
    whole_inputs,
)
from activedpo_fast.gradients.hooks import Capture
from activedpo_fast.gradients.lm_head import chunked_logps, language_model_head
from activedpo_fast.gradients.prompt_cache import continue_prompts, run_prompts
from activedpo_fast.gradients.segments import (
    chunk_segments,
    first_of_group,
    prompt_segments,
    response_segments,
    row_terms,
    whole_segments,
)
from activedpo_fast.models.adapters import causal_lm, decoder_of
from activedpo_fast.models.encoder_decoder import is_encoder_decoder
from activedpo_fast.ops import reference


def gradient_pass(
    model: nn.Module,
    batch: Batch,
    capture: Capture,
    *,
    shared: bool,
    relative: bool,
    lengths: torch.Tensor | None = None,
    through_prompts: bool = True,
) -> torch.Tensor:
    """Run the batch forward and back, so that `capture` sees every response's gradient.

    Rows of the captured segments are positions in the batch. Row b receives ∇ log π(y_b|x). With
    `relative` it receives ∇ (log π(y_b|x) - log π(y_1|x)), where y_1 is the first response of its
    group, whose own row receives nothing.

    Args:
        model: inside `undisturbed`, with `capture` entered.
        shared: the layout. A batch with separate prompts can only be run with `shared`.
        lengths: int64 [B], n_b, for log π(y_b|x) / n_b. Relative rows are then
            ∇ (n_1/n_b · log π(y_b|x) - log π(y_1|x)); each must still be divided by `divisors`.
        through_prompts: without it, the keys and values of separate prompts are constants. The
            batch is then of `Layout.APART`, and no prompt runs backward.

    Returns:
        log π(y|x), [B], float32 or float64.

    A prompt's tokens run forward once. In the backward pass, the tokens of all responses run once,
    as their gradients cannot mix, and those of a prompt once per row: M times for M responses,
    M - 1 times with `relative`.
    """
    terms = row_terms(batch, relative)
    weights = _weights(batch, relative, lengths)
    shapes, segments = _shapes(batch), response_segments(batch, terms)
    if not shared:
        with capture.forward(*shapes):
            logps = whole_model_logps(model, batch, everywhere=_tokens_would_miss(model, capture))
        _check_used(capture)
        with capture.backward(*segments):
            (logps * weights).sum().backward()
        return logps.detach()

    decoder = _decoder(model)
    with capture.forward(_shape(batch.prompt_ids)) if through_prompts else torch.no_grad():
        states = _prompt_states(model, decoder, batch)
    continued = _one_for_each_response(states, batch)
    if not batch.encoder_decoder:
        # Latent attention (DeepSeek) applies a layer to the prompt's tokens again.
        shapes += ((shapes[0][0], batch.prompt_ids.shape[1] + shapes[0][1]),)
        segments += (whole_segments(batch, terms, prompts=through_prompts),)
    with capture.forward(*shapes):
        output = _continue(decoder, batch, continued)
    logps, gradient = _scored_logps(model, batch, decoder, output, weights, (capture, terms))
    _check_used(capture)
    if output.last_hidden_state.requires_grad:
        with capture.backward(*segments):
            output.last_hidden_state.backward(gradient)
    del output, gradient
    _prompt_backward_passes(capture, batch, states, continued, relative)
    return logps


def _weights(batch: Batch, relative: bool, lengths: torch.Tensor | None) -> torch.Tensor:
    """Return the weight of each response's log-prob in the objective, [B]."""
    weights = torch.ones(len(batch.rows), device=batch.input_ids.device)
    if relative:
        if lengths is not None:
            weights = (divisors(batch, lengths, relative) / lengths).to(weights.device)
        # The first response counts negatively, in whichever row of its group it is summed.
        weights[first_of_group(batch).to(weights.device)] = -1.0
    return weights


def _prompt_backward_passes(
    capture: Capture,
    batch: Batch,
    states: list[torch.Tensor],
    continued: list[torch.Tensor],
    relative: bool,
) -> None:
    """Run the backward passes of the prompts, one per n-th response of all groups."""
    arrived = [
        (state, copy.grad)
        for state, copy in zip(states, continued, strict=True)
        if copy.grad is not None
    ]
    if not arrived:
        return
    parts = list(prompt_segments(batch, relative))
    for number, (group, responses, segments) in enumerate(parts, start=1):
        gradients = []
        for state, gradient in arrived:
            own, *others = (gradient[response.to(gradient.device)] for response in responses)
            part = sum(others, start=own)
            index = group.to(gradient.device)
            gradients.append(torch.zeros_like(state).index_copy_(0, index, part))
        with capture.backward(segments):
            torch.autograd.backward(
                [state for state, _ in arrived], gradients, retain_graph=number < len(parts)
            )


def divisors(batch: Batch, lengths: torch.Tensor, relative: bool) -> torch.Tensor:
    """Return the divisors of the rows of `gradient_pass` for means of log π, float64 [B].

    The rows are divided, not the objective, which would lose bits of small gradients in bf16.
    """
    of = lengths[first_of_group(batch)][batch.group_of] if relative else lengths
    return of.double()


def logp_pass(model: nn.Module, batch: Batch, *, shared: bool) -> torch.Tensor:
    """Return log π(y|x) of every response, [B], without gradients."""
    with torch.no_grad():
        if not shared:
            return whole_model_logps(model, batch)
        decoder = _decoder(model)
        output = _continue(
            decoder, batch, _one_for_each_response(_prompt_states(model, decoder, batch), batch)
        )
        return _scored_logps(model, batch, decoder, output, None, None)[0]


def whole_model_logps(model: nn.Module, batch: Batch, *, everywhere: bool = False) -> torch.Tensor:
    """Return log π(y|x) [B] from the model's own logits, as part of the autograd graph.

    With `everywhere` every layer runs on all tokens, as hooks expect.
    """
    # The head is needed from the token before the first scored one. Tokens before that in every
    # sequence of the batch are left out if the model supports it.
    scored = batch.scored.any(dim=0).nonzero()
    length = batch.input_ids.shape[1]
    first = int(scored[0]) if len(scored) else max(length - 1, 1)
    kept = length - first + 1
    inputs = _whole_inputs(batch)
    if _can_leave_out(causal_lm(model)) and length > 1 and not everywhere:
        inputs["logits_to_keep"] = kept
    logits = model(**inputs).logits[:, -kept:-1].to(batch.input_ids.device)
    logps = reference.response_logps(logits, batch.input_ids[:, first:])
    return (logps * batch.scored[:, first:]).sum(dim=1)


def hidden_pass(model: nn.Module, batch: Batch, *, shared: bool) -> torch.Tensor:
    """Return the last layer's hidden state at each response's last token, [B, h], no gradients.

    This is the LM head's input, after the final norm (`last_hidden_state` in transformers).
    """
    with torch.no_grad():
        if shared:
            decoder = _decoder(model)
            states = _prompt_states(model, decoder, batch)
            hidden = _continue(
                decoder, batch, _one_for_each_response(states, batch)
            ).last_hidden_state
        else:
            hidden = _what_the_head_reads(model, batch)
        # Virtual tokens of prompt tuning come before the others.
        last = batch.attention_mask.sum(dim=1) - 1 + hidden.shape[1] - batch.input_ids.shape[1]
        last = last.to(hidden.device)
        at_last: torch.Tensor = hidden[torch.arange(len(last), device=hidden.device), last]
        return at_last


def _what_the_head_reads(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the decoder's output for whole sequences, [B, T, h]."""
    found: list[torch.Tensor] = []
    decoder = decoder_of(model)
    if decoder is causal_lm(model):
        whole = model(**_whole_inputs(batch), output_hidden_states=True)
        hidden: torch.Tensor = whole.hidden_states[-1]
        return hidden
    handle = decoder.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    try:
        model(**_whole_inputs(batch))
    finally:
        handle.remove()
    return found[-1]


def _tokens_would_miss(model: nn.Module, capture: Capture) -> bool:
    """Return whether a captured layer may be called without the tokens that need no logits.

    Layers after the decoder are: the head, and what ModernBERT has before it. So are layers inside
    if the decoder itself leaves tokens out, as Gemma 4 does in layers without keys of their own.
    """
    decoder = decoder_of(model)
    stacks: list[nn.Module] = [decoder]
    if is_encoder_decoder(model):
        stacks.append(causal_lm(model).get_encoder())  # type: ignore[operator]
    within = {id(module) for stack in stacks for module in stack.modules()}
    return _can_leave_out(decoder) or any(
        id(layer.module) not in within for layer in capture.layers
    )


def _can_leave_out(module: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(module.forward).parameters


def _shape(ids: torch.Tensor) -> tuple[int, int]:
    return ids.shape[0], ids.shape[1]


def _shapes(batch: Batch) -> tuple[tuple[int, int], ...]:
    """Return [B, T]; with an encoder also [B, L], of what it gives the decoder to read."""
    own = _shape(batch.input_ids)
    return (own, (own[0], batch.prompt_ids.shape[1])) if batch.encoder_decoder else (own,)


def _decoder(model: nn.Module) -> nn.Module:
    """Return the stack of layers of a causal LM, without its head."""
    decoder = decoder_of(model)
    if decoder is causal_lm(model):
        raise ActiveDPOError("the model has no decoder apart from its head")
    return decoder


def _prompt_states(model: nn.Module, decoder: nn.Module, batch: Batch) -> list[torch.Tensor]:
    if batch.encoder_decoder:
        return [encode_prompts(causal_lm(model).get_encoder(), batch)]  # type: ignore[operator]
    if batch.prompt_ids.shape[1] == 0:
        return []
    return run_prompts(decoder, batch.prompt_ids, batch.prompt_mask)


def _one_for_each_response(states: list[torch.Tensor], batch: Batch) -> list[torch.Tensor]:
    """Return copies of the prompts' keys and values, [B, …], detached from the graph so that each
    response's gradient arrives at its own copy."""
    return [
        state.detach()
        .index_select(0, batch.group_of.to(state.device))
        .requires_grad_(state.requires_grad)
        for state in states
    ]


def _continue(decoder: nn.Module, batch: Batch, continued: list[torch.Tensor]) -> Any:
    if batch.encoder_decoder:
        return decoder(**decoder_inputs(batch, *continued))
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if continued:
        prompt_mask = batch.prompt_mask[batch.group_of.to(batch.prompt_mask.device)]
        inputs["attention_mask"] = torch.cat([prompt_mask, batch.attention_mask], dim=1)
        inputs["past_key_values"] = continue_prompts(continued)
        inputs["use_cache"] = True
    return decoder(**inputs)


def _scored_logps(
    model: nn.Module,
    batch: Batch,
    decoder: nn.Module,
    output: Any,
    weights: torch.Tensor | None,
    captured: tuple[Capture, list[tuple[int, int]]] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log π(y|x) [B] and the gradient of its weighted sum to hidden states [B, T, h]."""
    hidden = output.last_hidden_state  # on the last layer's device
    response, position = batch.scored.to(hidden.device).nonzero(as_tuple=True)
    owners = response.tolist()

    @contextmanager
    def around(start: int, end: int) -> Iterator[None]:
        if captured is None:
            yield
            return
        capture, terms = captured
        segments = chunk_segments(owners[start:end], terms)
        with capture.forward((1, end - start)), capture.backward(segments):
            yield

    inputs = head_inputs if batch.encoder_decoder else _head_inputs
    with language_model_head(causal_lm(model), decoder, output, inputs) as head:
        logps, gradient = chunked_logps(
            head,
            hidden.detach()[response, position - 1],
            batch.input_ids.to(hidden.device)[response, position],
            vocabulary=causal_lm(model).config.get_text_config().vocab_size,  # type: ignore[union-attr, operator]
            weights=None if weights is None else weights.to(hidden.device)[response],
            around=around,
        )
    total = logps.new_zeros(len(batch.rows)).index_add_(0, response, logps)
    if gradient is None:
        return total, None
    return total, torch.zeros_like(hidden).index_put_((response, position - 1), gradient)


def _head_inputs(ids: torch.Tensor, hidden: torch.Tensor) -> dict[str, Any]:
    return {"input_ids": ids}


def _whole_inputs(batch: Batch) -> dict[str, Any]:
    if batch.encoder_decoder:
        return whole_inputs(batch)
    # With padding on the right, the model's own position ids are correct.
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
        **batch.images,
    }


def _check_used(capture: Capture) -> None:
    if not capture.used:
        raise UnsupportedParameterError(
            "no trainable layer was called in the model's forward pass (first of them: "
            f"{capture.first_label!r})"
        )
