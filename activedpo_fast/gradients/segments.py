"""Which tokens of a batch add their part of a gradient to which row.

Segments are int64 [S, 3], of (first token, token after the last, row); the tokens are those of one
forward pass, row-major. A term is a pair (response, row): the response's tokens add to the row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from activedpo_fast.gradients.batches import Batch


def first_of_group(batch: Batch) -> torch.Tensor:
    """Return the first response of every group, int64 [P]; groups are contiguous."""
    return torch.searchsorted(batch.group_of, torch.arange(len(batch.prompt_ids)))


def row_terms(batch: Batch, relative: bool) -> list[tuple[int, int]]:
    """Return (response, row) for every response whose tokens add to a row, by response."""
    if not relative:
        return [(b, b) for b in range(len(batch.rows))]
    groups = batch.group_of.tolist()
    first = first_of_group(batch).tolist()
    members: dict[int, list[int]] = {group: [] for group in groups}
    for b, group in enumerate(groups):
        members[group].append(b)
    return [
        (b, row)
        for b, group in enumerate(groups)
        for row in (members[group][1:] if b == first[group] else [b])
    ]


def response_segments(batch: Batch, terms: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """Return the segments of the tokens of `input_ids`.

    With an encoder, also those of each response's prompt: the decoder reads both.
    """
    own = batch.attention_mask
    if not batch.encoder_decoder:
        return (_segments_of(own, terms),)
    prompts = batch.prompts_of_responses()[1]
    if prompts.shape == own.shape:
        # Layers that read either are not told apart then, and padding has no gradient.
        own = prompts = own | prompts
    return _segments_of(own, terms), _segments_of(prompts, terms)


def _segments_of(mask: torch.Tensor, terms: list[tuple[int, int]]) -> torch.Tensor:
    """Return the segments of the tokens that `mask` [B, T], padded on the right, has."""
    length = mask.shape[1]
    counts = mask.sum(dim=1).tolist()
    segments: list[list[int]] = []
    for b, row in sorted(terms, key=lambda term: (term[1], term[0])):
        start = b * length
        if segments and segments[-1][2] == row and segments[-1][0] == start - length:
            # Merge adjacent responses of the same row: padding between them has no gradient.
            segments[-1][1] = start + counts[b]
        else:
            segments.append([start, start + counts[b], row])
    return torch.tensor(segments, dtype=torch.int64).view(-1, 3)


def whole_segments(batch: Batch, terms: list[tuple[int, int]], *, prompts: bool) -> torch.Tensor:
    """Return the segments of the tokens of each response's prompt and its own, [B, L + T].

    prompts: whether the prompt's tokens, padded on the left, add to the row.
    """
    before = batch.prompt_ids.shape[1]
    length = before + batch.input_ids.shape[1]
    counts = batch.attention_mask.sum(dim=1).tolist()
    first = 0 if prompts else before
    segments = [
        [b * length + first, b * length + before + counts[b], row]
        for b, row in sorted(terms, key=lambda term: (term[1], term[0]))
    ]
    return torch.tensor(segments, dtype=torch.int64).view(-1, 3)


def chunk_segments(owners: list[int], terms: list[tuple[int, int]]) -> torch.Tensor:
    """Return the segments of a chunk of scored tokens, whose responses `owners` are ascending."""
    found: dict[int, tuple[int, int]] = {}
    for position, owner in enumerate(owners):
        found[owner] = (found.get(owner, (position, 0))[0], position + 1)
    segments = [[*found[b], row] for b, row in terms if b in found]
    return torch.tensor(segments, dtype=torch.int64).view(-1, 3)


def prompt_segments(
    batch: Batch, relative: bool
) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]]:
    """Yield what each backward pass of the prompts adds: one pass per n-th response of a group.

    Yields:
        The groups that have an n-th response, int64 [m]; the responses, int64 [m] each, whose
        gradients are added up there, the n-th ones and if `relative` the first ones; the segments
        of the tokens of `prompt_ids`.
    """
    groups, length = batch.prompt_ids.shape
    first = first_of_group(batch)
    sizes = torch.bincount(batch.group_of, minlength=groups)
    counts = batch.prompt_mask.sum(dim=1).cpu()
    begins = torch.zeros_like(counts) if batch.encoder_decoder else length - counts
    for n in range(1 if relative else 0, int(sizes.max())):
        group = (sizes > n).nonzero().squeeze(1)
        response = first[group] + n
        start = group * length + begins[group]
        segments = torch.stack([start, start + counts[group], response], dim=1)
        yield group, (response, first[group]) if relative else (response,), segments
