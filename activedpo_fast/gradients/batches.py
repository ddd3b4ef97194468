"""Batches of tokenized responses under a token budget; a prompt's tokens are stored once.

A batch has two parts. `prompt_ids` holds what the responses of an item have in common, padded on
the left; `input_ids` holds what each response adds, padded on the right. With the second part
continuing the first, the tokens of every response are contiguous. Position ids, sliding windows and
ALiBi slopes are therefore those of the response alone.

For an encoder-decoder model, `prompt_ids` is what the encoder reads, in every layout, and
`input_ids` what the decoder does. Either begins at position 0, so that both are padded on the
right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from os.path import commonprefix

import torch

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.positions import LengthClass
from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse


class Layout(Enum):
    """How responses are put into batches. The first three give the same numbers, those of them that
    a model supports; the fastest comes first. `APART` is for gradients of the response's tokens."""

    SHARED = "a prompt runs once for all of its responses"
    WHOLE = "every response runs with its prompt"
    ALONE = "every response runs with its prompt, and no other with it"
    APART = "a prompt runs once for its responses, and apart from them even if there is only one"

    @staticmethod
    def slowest(*layouts: Layout) -> Layout:
        """Return the slowest of the layouts, which assumes the least of the model."""
        return max(layouts, key=SAME_NUMBERS.index)


SAME_NUMBERS = (Layout.SHARED, Layout.WHOLE, Layout.ALONE)


@dataclass(frozen=True)
class Group:
    """Responses of one item, and how many tokens they share at the beginning.

    Attributes:
        rows: indices of the responses in the tokenized pool.
        shared: tokens that are run once for all of them; at least one token of each response, the
            one before its first scored token, is not shared.
        own: the largest number of tokens that a response has beyond the shared ones.
        kind: the length class of every response, and of the shared part. A batch has one kind.
    """

    rows: tuple[int, ...]
    shared: int
    own: int
    kind: int = 0


@dataclass(frozen=True)
class Batch:
    """Some groups of responses, padded: P prompts of at most L tokens, B responses of T more.

    Attributes:
        rows: int64 [B], indices of the responses in the tokenized pool; groups stay together.
        group_of: int64 [B], the group (0 .. P-1) of each response, ascending.
        prompt_ids, prompt_mask: int64 [P, L], padded on the left (with an encoder, on the right);
            L = 0 when nothing is shared.
        input_ids, attention_mask: int64 [B, T], padded on the right.
        position_ids: int64 [B, T], counted from the beginning of the prompt.
        scored: bool [B, T], True where the token's log-prob counts (response tokens; never the
            first token of a sequence, which nothing predicts, nor the first of `input_ids`).
        encoder_decoder: whether the two parts are for an encoder and a decoder.
        images: further arguments of the model, for the images of a prompt; B = 1 if there are any.
    """

    rows: torch.Tensor
    group_of: torch.Tensor
    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    scored: torch.Tensor
    encoder_decoder: bool = False
    images: dict[str, torch.Tensor] = field(default_factory=dict)

    def prompts_of_responses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `prompt_ids` and `prompt_mask` with a row for each response, [B, L]."""
        group_of = self.group_of.to(self.prompt_ids.device)
        return self.prompt_ids[group_of], self.prompt_mask[group_of]

    def to(self, device: torch.device) -> Batch:
        """Move the model inputs to `device`; `rows` and `group_of` stay on the CPU."""
        return Batch(
            self.rows,
            self.group_of,
            self.prompt_ids.to(device),
            self.prompt_mask.to(device),
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.scored.to(device),
            self.encoder_decoder,
            {name: value.to(device) for name, value in self.images.items()},
        )


def group_rows(
    tokenized: TokenizedPool,
    rows: Sequence[int],
    layout: Layout,
    length_class: LengthClass | None = None,
) -> list[Group]:
    """Group the responses `rows` by item, in the order in which the items first appear.

    With `Layout.SHARED`, responses of one item share their common beginning, up to the last token
    before the first scored one of any of them; a single response shares nothing. An item whose
    responses are of several length classes has a group for each class. Nothing is shared if the
    beginning is of a different class than the whole.

    With `Layout.APART`, every response has its prompt's tokens in the shared part, up to that last
    token, whatever the others are: an item with different prompt tokens (truncated, or merged with
    the response's first) has a group for each. So it is for an encoder-decoder model in every
    layout: what the encoder reads is the shared part.

    Raises:
        ActiveDPOError: with `Layout.APART`, a prompt of a different class than its response.
    """
    by_item: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
    apart = layout is Layout.APART or tokenized.encoder_decoder
    for row in rows:
        sequence = tokenized.sequences[row]
        kind = 0 if length_class is None else length_class(len(sequence.input_ids))
        item = row if layout is Layout.ALONE else tokenized.item_of(row)
        prompt = tuple(sequence.input_ids[: _before(sequence)]) if apart else ()
        by_item.setdefault((item, kind, prompt), []).append(row)
    groups = []
    for (_, kind, prompt), members in by_item.items():
        if apart:
            group = _of_prompt(tokenized.sequences, members, len(prompt))
        else:
            group = _group(tokenized.sequences, members, layout is Layout.SHARED)
        if group.shared and length_class is not None and length_class(group.shared) != kind:
            if apart:
                raise ActiveDPOError(
                    f"{tokenized.place(members[0])}: the model embeds positions of its prompt "
                    "differently in a longer sequence, so that the prompt cannot run apart; "
                    "gradient='response_tokens' cannot be had for it"
                )
            group = _group(tokenized.sequences, members, False)
        groups.append(replace(group, kind=kind))
    return groups


def plan_batches(groups: Sequence[Group], max_tokens: int, *, split: bool) -> Iterator[list[Group]]:
    """Plan batches of groups whose padded tokens, P·L + B·T, do not exceed `max_tokens`.

    Groups of similar length go together, longest first. A group that alone exceeds the budget is
    `split` into parts that repeat the prompt, or gets its own batch. The plan depends only on the
    lengths.
    """
    if split:
        groups = [part for group in groups for part in _split(group, max_tokens)]
    # Groups with a shared part need a prompt pass and others do not, so keep the two apart.
    parts: dict[tuple[bool, int], list[Group]] = {}
    for group in groups:
        parts.setdefault((group.shared == 0, group.kind), []).append(group)
    for _, part in sorted(parts.items()):
        # Try two orders, as either part of the sequences may be the longer one; keep the better.
        plans = [
            list(_fill(sorted(part, key=key), max_tokens))
            for key in (lambda g: (-g.shared, -g.own), lambda g: (-g.own, -g.shared))
        ]
        yield from min(plans, key=lambda plan: sum(padded_tokens(batch) for batch in plan))


def padded_tokens(groups: Sequence[Group]) -> int:
    """Return the number of tokens in a batch of `groups`, padding included: P·L + B·T."""
    responses = sum(len(group.rows) for group in groups)
    length, longest = max(group.shared for group in groups), max(group.own for group in groups)
    return len(groups) * length + responses * longest


def collate(tokenized: TokenizedPool, groups: Sequence[Group], *, pad_token_id: int) -> Batch:
    """Pad the responses of `groups`; `pad_token_id` never influences a result."""
    sequences = tokenized.sequences
    rows = [row for group in groups for row in group.rows]
    shared_of = [group.shared for group in groups for _ in group.rows]
    length, longest = max(g.shared for g in groups), max(g.own for g in groups)
    prompt_ids = torch.full((len(groups), length), pad_token_id, dtype=torch.int64)
    prompt_mask = torch.zeros_like(prompt_ids)
    for index, group in enumerate(groups):
        if group.shared:
            ids = sequences[group.rows[0]].input_ids[: group.shared]
            start = 0 if tokenized.encoder_decoder else length - group.shared
            prompt_ids[index, start : start + group.shared] = torch.tensor(ids)
            prompt_mask[index, start : start + group.shared] = 1
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    scored = torch.zeros_like(input_ids, dtype=torch.bool)
    for index, (row, shared) in enumerate(zip(rows, shared_of, strict=True)):
        sequence = sequences[row]
        count = len(sequence.input_ids) - shared
        input_ids[index, :count] = torch.tensor(sequence.input_ids[shared:])
        attention_mask[index, :count] = 1
        scored[index, max(sequence.completion_start, 1) - shared : count] = True
    group_of = torch.repeat_interleave(
        torch.arange(len(groups)), torch.tensor([len(group.rows) for group in groups])
    )
    position_ids = torch.tensor(shared_of).unsqueeze(1) + torch.arange(longest)
    # Padding could be beyond the last position that a model has an embedding for.
    position_ids = torch.where(attention_mask.bool(), position_ids, 0)
    return Batch(
        torch.tensor(rows),
        group_of,
        prompt_ids,
        prompt_mask,
        input_ids,
        attention_mask,
        position_ids,
        scored,
        tokenized.encoder_decoder,
        _image_inputs([sequences[row] for row in rows]),
    )


def _image_inputs(sequences: Sequence[TokenizedResponse]) -> dict[str, torch.Tensor]:
    images = [sequence.images for sequence in sequences if sequence.images is not None]
    if not images:
        return {}
    assert len(sequences) == 1, "responses to images run alone"
    return images[0].model_inputs(len(sequences[0].input_ids))


def _group(sequences: Sequence[TokenizedResponse], rows: list[int], share: bool) -> Group:
    members = [sequences[row] for row in rows]
    shared = 0
    if share and len(members) > 1:
        shared = min(map(_before, members))
        # commonprefix is meant for paths, but compares any sequences.
        shared = len(commonprefix([list(member.input_ids[:shared]) for member in members]))
    return _of_prompt(sequences, rows, shared)


def _of_prompt(sequences: Sequence[TokenizedResponse], rows: list[int], shared: int) -> Group:
    own = max(len(sequences[row].input_ids) for row in rows) - shared
    return Group(tuple(rows), shared, own)


def _before(sequence: TokenizedResponse) -> int:
    """Return the number of tokens before the one that predicts the first scored token."""
    return min(max(sequence.completion_start, 1), len(sequence.input_ids)) - 1


def _split(group: Group, max_tokens: int) -> Iterator[Group]:
    fitting = max(1, (max_tokens - group.shared) // group.own)
    for start in range(0, len(group.rows), fitting):
        yield replace(group, rows=group.rows[start : start + fitting])


def _fill(groups: Sequence[Group], max_tokens: int) -> Iterator[list[Group]]:
    batch: list[Group] = []
    responses = shared = own = 0
    for group in groups:
        responses, shared, own = (
            responses + len(group.rows),
            max(shared, group.shared),
            max(own, group.own),
        )
        # As `padded_tokens`, without a look at the whole batch for each of its groups.
        if batch and (len(batch) + 1) * shared + responses * own > max_tokens:
            yield batch
            batch = []
            responses, shared, own = len(group.rows), group.shared, group.own
        batch.append(group)
    if batch:
        yield batch
