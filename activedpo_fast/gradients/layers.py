"""The layers whose per-response gradients hooks can capture, and by which rule.

A layer is seen where it is called: its inputs in the forward pass, the gradient of its output in
the backward pass. From these, without any gradient of a weight from autograd:

* a linear layer y = W h: Σ_t g_t h_tᵀ;
* an embedding: g_t, added to the row of token t, and with LoRA, g_t by its other matrix;
* a norm: Σ_t g_t u_t, where u is the derivative of the module's own forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from activedpo_fast.errors import UnsupportedParameterError
from activedpo_fast.gradients.terms import Formed, OneHot, Outer, Term
from activedpo_fast.ops import OneHotSum
from activedpo_fast.ops.reference import sum_dtype

# (gradient of the layer's output, segments int64 [S, 3]) -> what the layer adds to rows
Rule = Callable[[Tensor, Tensor], list[Term]]


class Call(NamedTuple):
    """A call of a layer in a forward pass of B x T tokens, `shape`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: tuple[int, int]

    @property
    def first(self) -> Any:
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


class Layer(Protocol):
    """A layer with at least one trainable parameter."""

    @property
    def module(self) -> nn.Module:
        """The module whose calls are seen."""

    @property
    def label(self) -> str:
        """The canonical name of a trainable parameter, for messages."""

    def seen(self, call: Call) -> Rule:
        """Return the rule for a call; it keeps what it needs of the call, detached.

        Raises UnsupportedParameterError if the layer was called in a way that has no rule.
        """


@dataclass(frozen=True)
class TrainableLinear:
    """A linear layer.

    Attributes:
        module: the `nn.Linear`, or transformers' `Conv1D`, whose weight is stored transposed.
        weight: canonical name of its weight if that is trainable, else None.
        bias: canonical name of its bias if that is trainable, else None.
        readers: for a LoRA A matrix, the B matrices that read its output (several if layers share
            it); nothing else reads it.
    """

    module: nn.Module
    weight: str | None
    bias: str | None
    readers: tuple[nn.Module, ...] = ()

    @property
    def label(self) -> str:
        return self.weight or self.bias or "?"

    def seen(self, call: Call) -> Rule:
        h = by_token(self.label, call.first.detach(), call.shape)

        def rule(g: Tensor, segments: Tensor) -> list[Term]:
            g = by_token(self.label, g, call.shape)
            terms: list[Term] = []
            if self.weight is not None:
                left, right = (h, g) if isinstance(self.module, Conv1D) else (g, h)
                terms.append(_outer(self.weight, left, right, h))
            if self.bias is not None:
                terms.append(_outer(self.bias, g, g.new_ones(len(g), 1)))
            return terms

        return rule


@dataclass(frozen=True)
class TrainableEmbedding:
    """An embedding of tokens, with its own forward pass or with one that scales by `embed_scale`.

    weight: canonical name of its weight.
    """

    module: nn.Embedding
    weight: str

    @property
    def label(self) -> str:
        return self.weight

    def seen(self, call: Call) -> Rule:
        ids = _ids_by_token(self.label, call)
        places = ids.where(ids != _padding(self.module), -1)
        shape = (self.module.num_embeddings, self.module.embedding_dim)

        def rule(g: Tensor, segments: Tensor) -> list[Term]:
            g = _scaled(by_token(self.label, g, call.shape), self.module)
            return [OneHot(self.weight, OneHotSum(shape, places, g))]

        return rule


@dataclass(frozen=True)
class TrainedTokens:
    """The rows of an embedding, or of a head tied to it, that PEFT trains for some tokens.

    adapter: whose rows; `tokens` are their ids. name: their canonical name.
    """

    module: TrainableTokensLayer
    adapter: str
    name: str

    @property
    def label(self) -> str:
        return self.name

    @property
    def tokens(self) -> list[int]:
        return list(self.module.token_indices[self.adapter])

    def seen(self, call: Call) -> Rule:
        base = self.module.get_base_layer()
        tokens = torch.tensor(self.tokens, device=call.first.device)
        if not isinstance(base, nn.Embedding):
            h = by_token(self.label, call.first.detach(), call.shape)

            def of_head(g: Tensor, segments: Tensor) -> list[Term]:
                g = by_token(self.label, g, call.shape)[:, tokens]
                return [_outer(self.name, g, h, h)]

            return of_head
        ids = _ids_by_token(self.label, call)
        place_of = ids.new_full((base.num_embeddings,), -1)
        place_of[tokens] = torch.arange(len(tokens), device=tokens.device)
        places = place_of[ids].where(ids != _padding(base), -1)

        def rule(g: Tensor, segments: Tensor) -> list[Term]:
            g = _scaled(by_token(self.label, g, call.shape), base)
            return [OneHot(self.name, OneHotSum((len(tokens), base.embedding_dim), places, g))]

        return rule


@dataclass(frozen=True)
class TrainableEmbeddingLora:
    """LoRA on an embedding: output + s B a, where a is the token's column of A.

    a, b: canonical names of A [r, V] and B [d, r], or None if frozen.
    """

    module: LoraEmbedding
    adapter: str
    a: str | None
    b: str | None

    @property
    def label(self) -> str:
        return self.a or self.b or "?"

    def seen(self, call: Call) -> Rule:
        ids = _ids_by_token(self.label, call)
        base = self.module.get_base_layer()
        weight_a = self.module.lora_embedding_A[self.adapter].detach()
        weight_b = self.module.lora_embedding_B[self.adapter].detach()
        assert isinstance(base, nn.Embedding)
        places = ids.where(ids != _padding(base), -1)

        def rule(g: Tensor, segments: Tensor) -> list[Term]:
            g = _scaled(by_token(self.label, g, call.shape), base)
            g = g.to(weight_b.dtype) * self.module.scaling[self.adapter]
            terms: list[Term] = []
            if self.a is not None:
                shape = (weight_a.shape[0], weight_a.shape[1])
                terms.append(OneHot(self.a, OneHotSum(shape, places, g @ weight_b, by_column=True)))
            if self.b is not None:
                terms.append(_outer(self.b, g, weight_a.T[ids]))
            return terms

        return rule


@dataclass(frozen=True)
class Elementwise:
    """A module each of whose parameters acts on the output's last dimensions number by number.

    Norms are such. With u the derivative of the output in the direction
    of ones in the parameter, ∂output_j/∂parameter_j = u_j: the gradient is Σ_t g_t u_t. u is from
    forward-mode differentiation of the module, whatever its formula.

    Attributes:
        names: canonical names of the trainable parameters, by their names in the module.
    """

    module: nn.Module
    names: Mapping[str, str]

    @property
    def label(self) -> str:
        return next(iter(self.names.values()))

    def seen(self, call: Call) -> Rule:
        again = _Again(self.label, self.module, self.names, call)

        def rule(g: Tensor, segments: Tensor) -> list[Term]:
            again.check(g)
            found: dict[str, Tensor] = {}
            for name, parameter in again.parameters.items():
                if parameter.shape != g.shape[g.dim() - parameter.dim() :]:
                    raise _no_rule(self.label, "has an output that", g, call.shape)
                u = _derivative(self.label, again, name, parameter)
                between = list(range(1, g.dim() - parameter.dim()))
                found[name] = (g * u).sum(between, dtype=sum_dtype(g.dtype))
            return _by_sequence(again, self.names, found, segments)

        return rule


class _Again:
    """A call of a module that can be repeated with other parameters.

    What its output depends on beside its tensor arguments, whose first dimension is the batch's,
    must be constant.
    """

    def __init__(self, label: str, module: nn.Module, names: Mapping[str, str], call: Call) -> None:
        self.label, self._module, self.shape = label, module, call.shape
        self._args = tuple(_detached(value) for value in call.args)
        self._kwargs = {key: _detached(value) for key, value in call.kwargs.items()}
        own = dict(module.named_parameters())
        self.parameters = {name: own[name].detach() for name in names}
        for value in (*self._args, *self._kwargs.values()):
            if isinstance(value, Tensor):
                self.check(value)
        self._device = call.first.device.type
        self._autocast = (
            torch.get_autocast_dtype(self._device),
            torch.is_autocast_enabled(self._device),
        )

    def output(self, parameters: dict[str, Tensor]) -> Tensor:
        dtype, enabled = self._autocast
        with torch.autocast(self._device, dtype, enabled=enabled, cache_enabled=False):
            found: Tensor = torch.func.functional_call(
                self._module, parameters, self._args, self._kwargs
            )
        return found

    def check(self, tensor: Tensor) -> None:
        """Raise `UnsupportedParameterError` unless the first dimension is the batch's."""
        shape = self.shape
        if tensor.dim() < 3 or tensor.shape[0] != shape[0] or shape[1] not in tensor.shape[1:-1]:
            raise _no_rule(self.label, "has a tensor that", tensor, shape)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _derivative(label: str, again: _Again, name: str, parameter: Tensor) -> Tensor:
    """Return the derivative of the output in the direction of ones in a parameter."""
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(parameter, torch.ones_like(parameter))
        try:
            output = again.output({**again.parameters, name: dual})
        except NotImplementedError as error:
            raise UnsupportedParameterError(
                f"cannot capture per-sample gradients of {label!r}: its module has no forward-mode "
                "derivative; use verify=True, which finds this out and takes all gradients from "
                "autograd"
            ) from error
        tangent = forward_ad.unpack_dual(output).tangent
    return torch.zeros_like(output) if tangent is None else tangent


def _by_sequence(
    again: _Again, names: Mapping[str, str], found: Mapping[str, Tensor], segments: Tensor
) -> list[Term]:
    """Return what gradients of each sequence, [B, *shape], add to rows."""
    sequence, row = _sequences(again.label, segments, again.shape[1])
    rows, place = row.unique(return_inverse=True)
    terms: list[Term] = []
    for key, name in names.items():
        gradients = found[key]
        summed = gradients.new_zeros(len(rows), *gradients.shape[1:])
        of_pairs = gradients[sequence.to(gradients.device)]
        summed.index_add_(0, place.to(gradients.device), of_pairs)
        terms.append(Formed(name, summed, rows))
    return terms


def silent_modules(layers: Sequence[Layer]) -> frozenset[int]:
    """Return ids of the A matrices whose B is currently all zero, as at LoRA's initialization."""
    return frozenset(
        id(layer.module)
        for layer in layers
        if isinstance(layer, TrainableLinear)
        and layer.readers
        and not any(torch.count_nonzero(b.weight) for b in layer.readers)  # type: ignore[arg-type]
    )


def has_tokens(leading: Sequence[int], shape: tuple[int, int]) -> bool:
    """Return whether a tensor with these leading dimensions has a row for each of B x T tokens."""
    # Some MLPs flatten batch and time; attention may have dimensions of heads or chunks. Unless the
    # sequences come first, the order is another one. The self-check verifies it.
    count, first = math.prod(leading), next((size for size in leading if size != 1), 1)
    return count == shape[0] * shape[1] and (shape[0] == 1 or first in (shape[0], count))


def by_token(label: str, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a layer's input or output [..., d] as [B T, d], the tokens row-major."""
    leading = tensor.shape[:-1]
    if leading == shape or has_tokens(leading, shape):
        return tensor.reshape(-1, tensor.shape[-1])
    what = "is a routed expert, which" if "expert" in label else "has an input that"
    raise _no_rule(label, what, tensor, shape)


def _no_rule(
    label: str, what: str, tensor: Tensor, shape: tuple[int, int]
) -> UnsupportedParameterError:
    return UnsupportedParameterError(
        f"cannot capture per-sample gradients of {label!r}: it {what} has not one row for "
        f"each of {shape[0]} × {shape[1]} tokens (shape {list(tensor.shape)}); use verify=True, "
        "which finds this out and takes all gradients from autograd"
    )


def _ids_by_token(label: str, call: Call) -> Tensor:
    return by_token(label, call.first.unsqueeze(-1), call.shape).squeeze(-1)


def _padding(embedding: nn.Embedding) -> int:
    """Return the id whose row has no gradient, -1 for none."""
    return -1 if embedding.padding_idx is None else embedding.padding_idx


def _scaled(g: Tensor, embedding: nn.Embedding) -> Tensor:
    """Return the gradient of the embedded vectors before the module scales them."""
    scale: Any = getattr(embedding, "embed_scale", None)
    if scale is None:
        return g
    return g * (scale.to(g.dtype) if isinstance(scale, Tensor) else scale)


def _outer(name: str, left: Tensor, right: Tensor, h: Tensor | None = None) -> Outer:
    """Return Σ_t left_t right_tᵀ; h: the operand, if any, that the rule keeps for later passes."""
    if left.dtype != right.dtype:
        # Under autocast an input is there before the cast, and g has the cast dtype.
        dtype = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(dtype), right.to(dtype)
    kept = (0 if left is h else left.nbytes) + (0 if right is h else right.nbytes)
    return Outer(name, left, right, kept)


def _sequences(label: str, segments: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return (sequence, row) for every sequence of `length` tokens that adds to a row.

    Tokens of a sequence that no segment has are padding: their gradient is zero.
    """
    begins: dict[int, int] = {}
    found: list[tuple[int, int]] = []
    for start, end, row in segments.tolist():
        for sequence in range(start // length, (end - 1) // length + 1 if end > start else 0):
            begin = max(start, sequence * length)
            if begins.setdefault(sequence, begin) != begin:
                raise UnsupportedParameterError(
                    f"cannot capture per-sample gradients of {label!r}: it sees tokens of several "
                    "responses in one sequence; use verify=True, which finds this out and takes "
                    "all gradients from autograd"
                )
            found.append((sequence, row))
    pairs = torch.tensor(found, dtype=torch.int64).view(-1, 2)
    return pairs[:, 0], pairs[:, 1]
