"""Token ids of prompts and responses, identical to those of `trl.DPOTrainer` (TRL 1.16).

The rules are those of TRL's `DPOTrainer._prepare_dataset` and `DataCollatorForPreference`:

* Plain text: the EOS token's text is appended to the response unless it already ends with it.
  Prompt and prompt + response are each tokenized as one string, with the tokenizer's own special
  tokens.
* Chat: prompt with `add_generation_prompt=True`, and prompt + response, each through the template.
* The response starts where the tokens of the prompt and of prompt + response diverge. Both
  responses of a pair start at the earlier of the two positions.
* A sequence longer than `max_length` loses its end ("keep_start") or its beginning ("keep_end").
* With "keep_start", a pair whose prompt alone fills `max_length` is left out.

TRL itself is not needed. It does not train encoder-decoder models, for which
`pool.encoder_decoder_tokens` has the rules.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.encoder_decoder_tokens import encode_for_decoder
from activedpo_fast.pool.items import PoolItem
from activedpo_fast.pool.pool import PreferencePool, as_pool
from activedpo_fast.pool.string_contents import check_reads_strings
from activedpo_fast.pool.template import check_template_kwargs, template_kwargs
from activedpo_fast.pool.tokenizers import leaves_tokenizer
from activedpo_fast.pool.unrendered import warn_of_unrendered
from activedpo_fast.pool.vision import ProcessingClass, PromptImages, encode_with_images, in_parts
from activedpo_fast.progress import progress_bar

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

TruncationMode = Literal["keep_start", "keep_end"]

# Defaults of `trl.DPOConfig`.
DEFAULT_MAX_LENGTH = 1024
DEFAULT_TRUNCATION_MODE: TruncationMode = "keep_start"

_ITEMS_A_BATCH = 256


@dataclass(frozen=True, slots=True)
class TokenizedResponse:
    """A prompt with one response, after truncation.

    `input_ids[completion_start:]` belong to the response. The scored tokens are
    `input_ids[max(completion_start, 1):]`: nothing predicts the first token of a sequence. They are
    kept as 32-bit numbers, a tenth of what Python's own would take: a pool may have millions.
    `images` is what the model gets beside them, if the prompt has images.
    """

    input_ids: Sequence[int]
    completion_start: int
    images: PromptImages | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", array("i", self.input_ids))


@dataclass(frozen=True)
class TokenizedPool:
    """`sequences`: R tokenized responses in pool order.

    `skipped`: positions of the items that DPOTrainer leaves out because their prompt fills
    `max_length`. Their sequences stay in the list, with no scored token, to keep the order. Every
    response of every other item has at least one scored token.

    `items`: the item of each sequence, ascending. None: every sequence is a separate item.

    `ids`: the id of each item, for messages.

    `numbers`: of each sequence among the responses of its item, from 0. None: all of them are here.

    `encoder_decoder`: each sequence is the encoder's tokens and then the decoder's, whose first is
    the one before `completion_start`.
    """

    sequences: list[TokenizedResponse]
    skipped: list[int]
    items: list[int] | None = None
    ids: list[str] | None = None
    numbers: list[int] | None = None
    encoder_decoder: bool = False

    @property
    def has_images(self) -> bool:
        return any(sequence.images is not None for sequence in self.sequences)

    def item_of(self, row: int) -> int:
        """Return the item that response `row` belongs to."""
        return row if self.items is None else self.items[row]

    def place(self, row: int) -> str:
        """Return a description of response `row` to look it up in the pool."""
        if self.items is None or self.ids is None:
            return f"response row {row}"
        return f"item {self.ids[self.items[row]]!r}, response {self._number(row) + 1}"

    def only(self, rows: Sequence[int]) -> TokenizedPool:
        """Return some of the responses, `rows` in ascending order; items keep their numbers."""
        return replace(
            self,
            sequences=[self.sequences[row] for row in rows],
            items=[self.item_of(row) for row in rows],
            numbers=[self._number(row) for row in rows],
        )

    def _number(self, row: int) -> int:
        if self.numbers is not None:
            return self.numbers[row]
        return 0 if self.items is None else row - bisect_left(self.items, self.items[row])


def scored_tokens(response: TokenizedResponse) -> int:
    """Return the number of tokens that log π(y|x) sums over."""
    return max(0, len(response.input_ids) - max(response.completion_start, 1))


def completion_tokens(response: TokenizedResponse) -> int:
    """Return the divisor of log π(y|x) in TRL's mean log-probs: the response's tokens, at least 1.

    They are counted after truncation, including the first token of a sequence, which is not scored.
    """
    return max(1, len(response.input_ids) - response.completion_start)


def tokenize_pool(
    pool: PreferencePool | datasets.Dataset,
    processing_class: ProcessingClass,
    *,
    max_length: int | None = DEFAULT_MAX_LENGTH,
    truncation_mode: TruncationMode = DEFAULT_TRUNCATION_MODE,
    chat_template_kwargs: dict[str, Any] | None = None,
    decoder_start_token_id: int | None = None,
    with_images: bool | None = None,
    show_progress: bool | None = None,
) -> TokenizedPool:
    """Tokenize a pool as `trl.DPOTrainer` would tokenize its pairs.

    For an item with two responses the result is the trainer's. With more, all responses of the item
    share the earliest start of any of them. If tokens merge across the boundary for some of them,
    or the template renders the prompt differently, the trainer starts a pair of the others later.
    One warning gives the number of such items.

    If a prompt of the pool has images, its items are tokenized as in `pool.vision`.

    Args:
        processing_class: the model's tokenizer, or its processor, which images need.
        max_length: maximum sequence length in tokens, ≥ 2; None for no limit. TRL's default is
            1024.
        truncation_mode: "keep_start" (TRL's default) or "keep_end" (deprecated there, and refused
            for images).
        chat_template_kwargs: passed to the chat template. Those in an item's own column of this
            name, which TRL passes, take precedence. Plain text uses neither.
        decoder_start_token_id: for an encoder-decoder model, what its decoder begins with (see
            `activedpo_fast.models.encoder_decoder`). The prompt is for the encoder then, and the
            response for the decoder; see `activedpo_fast.pool.encoder_decoder_tokens`.
        with_images: whether to tokenize as with images; for a part of a pool, as the pool. Default:
            if there are any.
        show_progress: None shows a bar on a terminal only.

    Raises:
        ActiveDPOError: no usable tokenizer, no EOS token (plain text), no chat template (chat), a
            template that refuses a conversation or renders nothing for a response, bad options;
            images without a processor, or that cannot be read; for an encoder-decoder model also
            chat, images, "keep_end", or a prompt without tokens.
    """
    tokenized, noticed = tokenize_noticing(
        pool,
        processing_class,
        max_length=max_length,
        truncation_mode=truncation_mode,
        chat_template_kwargs=chat_template_kwargs,
        decoder_start_token_id=decoder_start_token_id,
        with_images=with_images,
        show_progress=show_progress,
    )
    noticed.warn(tokenized, max_length, truncation_mode)
    return tokenized


class Noticed(NamedTuple):
    """How many prompts and responses are treated in a way that may surprise."""

    prompts: int
    responses: int
    merged: int
    unequal: int
    skipped: int
    cut: int

    def warn(self, tokenized: TokenizedPool, max_length: int | None, truncation_mode: str) -> None:
        """Log them."""
        as_in = "" if tokenized.encoder_decoder else ", as in DPOTrainer"
        if self.merged:
            logger.warning(
                "%d of %d prompts are not tokenized the same alone as with a response "
                "(tokens merge at the boundary, or the chat template renders them "
                "differently); the response starts where they diverge, as in DPOTrainer",
                self.merged,
                self.prompts,
            )
        if self.unequal:
            logger.warning(
                "%d of %d prompts have three or more responses that start at different "
                "tokens; all start at the earliest, while DPOTrainer starts some pairs later",
                self.unequal,
                self.prompts,
            )
        if self.cut:
            logger.warning(
                "%d of %d responses are longer than max_length=%d with their prompt and are "
                "cut at the %s%s",
                self.cut,
                self.responses,
                max_length,
                "end" if truncation_mode == "keep_start" else "beginning",
                as_in,
            )
        if self.skipped:
            logger.warning(
                "%d of %d prompts fill max_length=%d and are skipped%s",
                self.skipped,
                self.prompts,
                max_length,
                as_in,
            )


@leaves_tokenizer(1)
def tokenize_noticing(
    pool: PreferencePool | datasets.Dataset,
    processing_class: ProcessingClass,
    *,
    max_length: int | None,
    truncation_mode: TruncationMode,
    chat_template_kwargs: dict[str, Any] | None,
    decoder_start_token_id: int | None,
    show_progress: bool | None,
    with_images: bool | None = None,
) -> tuple[TokenizedPool, Noticed]:
    """`tokenize_pool` without its warnings, and what they would be about."""
    encoder_decoder = decoder_start_token_id is not None
    _check_truncation(max_length, truncation_mode, encoder_decoder)
    pool = as_pool(pool)
    with_images = pool.has_images if with_images is None else with_images
    if encoder_decoder:
        check_tokenizer(processing_class, chat=False)
    else:
        _check_processing_class(pool, processing_class, with_images)
    if with_images and max_length is not None and truncation_mode == "keep_end":
        raise ActiveDPOError(
            "truncation_mode 'keep_end' would cut images, and DPOTrainer refuses it for them: use "
            "'keep_start', or max_length=None"
        )
    check_template_kwargs(chat_template_kwargs)
    encoded: _Encoded
    if pool.is_chat and not encoder_decoder:
        if isinstance(processing_class, PreTrainedTokenizerBase):
            check_reads_strings(pool, processing_class)
        warn_of_unrendered(pool, processing_class, chat_template_kwargs or {})
        if with_images and isinstance(processing_class, ProcessorMixin):
            encoded = encode_with_images(pool, processing_class, chat_template_kwargs or {})
        else:
            encoded = _encode_chat(pool, processing_class, chat_template_kwargs or {})
    else:
        if chat_template_kwargs:
            logger.warning(
                "chat_template_kwargs have no effect: the texts are plain, not chat messages"
            )
        assert isinstance(processing_class, PreTrainedTokenizerBase)
        encoded = (
            _encode_plain(pool, processing_class)
            if decoder_start_token_id is None
            else encode_for_decoder(pool, processing_class, decoder_start_token_id)
        )

    sequences: list[TokenizedResponse] = []
    items: list[int] = []
    skipped: list[int] = []
    merged = unequal = cut = 0
    bar = progress_bar(
        show_progress,
        zip(pool, encoded, strict=True),
        total=len(pool),
        desc="tokenize",
        unit="prompt",
    )
    for position, (item, (prompt_ids, full_ids, images)) in enumerate(bar):
        starts = [_common_prefix_length(prompt_ids, ids) for ids in full_ids]
        start = min(starts)
        merged += start < len(prompt_ids)
        # Two responses past the earliest start form a pair that could start later.
        unequal += sum(other > start for other in starts) >= 2
        for n, ids in enumerate(full_ids, start=1):
            if len(ids) <= max(start, 1):
                raise ActiveDPOError(
                    f"item {item.id!r}: response {n} adds no token to the prompt "
                    "that could be scored"
                )
            sequence = _truncate(ids, start, max_length, truncation_mode)
            sequences.append(sequence if images is None else _with_images(sequence, images))
            items.append(position)
        if max_length is not None and truncation_mode == "keep_start" and start >= max_length:
            skipped.append(position)
        elif max_length is not None:
            cut += sum(len(ids) > max_length for ids in full_ids)

    noticed = Noticed(len(pool), len(sequences), merged, unequal, len(skipped), cut)
    tokenized = TokenizedPool(sequences, skipped, items, pool.ids, encoder_decoder=encoder_decoder)
    return tokenized, noticed


def check_tokenizer(processing_class: Any, *, chat: bool) -> None:
    """Raise ActiveDPOError unless this is a text tokenizer with an EOS token or a chat template."""
    if isinstance(processing_class, ProcessorMixin):
        raise ActiveDPOError(
            f"processing_class: {type(processing_class).__name__} is a processor "
            "for images or sound, which is not supported here; pass its tokenizer"
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ActiveDPOError(
            "processing_class: expected a transformers tokenizer, got "
            f"{type(processing_class).__name__}"
        )
    if chat and not processing_class.chat_template:
        raise ActiveDPOError(
            "processing_class: the tokenizer has no chat template, which chat messages need"
        )
    if not chat and processing_class.eos_token is None:
        raise ActiveDPOError(
            "processing_class: the tokenizer has no EOS token to end plain-text "
            "responses with; set tokenizer.eos_token"
        )


def encode_chat(
    processing_class: ProcessingClass, messages: list[Any], id: str, **template_kwargs: Any
) -> list[int]:
    """Return the token ids of a conversation; `id` names its item in the error."""
    batched = isinstance(processing_class, ProcessorMixin)
    if batched:
        messages = in_parts(messages, f"item {id!r}")
    try:
        encoded: Any = processing_class.apply_chat_template(
            messages, tokenize=True, return_dict=True, **template_kwargs
        )
    except Exception as error:  # a template is code and can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ActiveDPOError(f"item {id!r}: the chat template failed: {reason}") from error
    ids = encoded["input_ids"]
    return list(ids[0] if batched else ids)


def _check_processing_class(pool: PreferencePool, processing_class: Any, with_images: bool) -> None:
    if not isinstance(processing_class, ProcessorMixin):
        check_tokenizer(processing_class, chat=pool.is_chat)
        if with_images:
            raise ActiveDPOError(
                "the pool has images: pass the model's processor (transformers.AutoProcessor) as "
                "processing_class, or select by a strategy that needs no model, such as random"
            )
    elif not pool.is_chat:
        raise ActiveDPOError(
            f"processing_class: {type(processing_class).__name__} is a processor, and the texts "
            "are plain: pass its tokenizer"
        )
    elif not processing_class.chat_template:
        raise ActiveDPOError(
            "processing_class: the processor has no chat template, which chat messages need"
        )


def _check_truncation(max_length: int | None, truncation_mode: str, encoder_decoder: bool) -> None:
    if max_length is not None and not isinstance(max_length, int):
        raise ActiveDPOError(f"max_length: {max_length!r} is not an integer")
    if max_length is not None and max_length < 2:
        raise ActiveDPOError(f"max_length: {max_length} leaves no token to score, 2 is the least")
    if truncation_mode not in ("keep_start", "keep_end"):
        raise ActiveDPOError(
            f"truncation_mode: {truncation_mode!r} is neither 'keep_start' nor 'keep_end'"
        )
    if encoder_decoder and truncation_mode == "keep_end":
        raise ActiveDPOError(
            "truncation_mode: 'keep_end' would cut the prompt that an encoder reads; use "
            "'keep_start', and shorten long prompts yourself"
        )


_Encoded = Iterator[tuple[list[int], list[list[int]], PromptImages | None]]


def _encode_plain(pool: PreferencePool, tokenizer: PreTrainedTokenizerBase) -> _Encoded:
    eos = str(tokenizer.eos_token)
    for begin in range(0, len(pool), _ITEMS_A_BATCH):
        items: list[PoolItem] = list(pool[begin : begin + _ITEMS_A_BATCH])
        texts: list[str] = []
        for item in items:
            texts.append(str(item.prompt))
            for response in item.responses:
                text = f"{item.prompt}{response}"
                texts.append(text if str(response).endswith(eos) else text + eos)
        ids = iter(tokenizer(text=texts)["input_ids"])
        for item in items:
            yield next(ids), [next(ids) for _ in item.responses], None


def _encode_chat(
    pool: PreferencePool, tokenizer: ProcessingClass, common: dict[str, Any]
) -> _Encoded:
    for item in pool:
        messages = list(item.prompt)
        arguments = template_kwargs(item.extra, common)
        prompt = encode_chat(tokenizer, messages, item.id, add_generation_prompt=True, **arguments)
        yield (
            prompt,
            [
                encode_chat(tokenizer, [*messages, *response], item.id, **arguments)
                for response in item.responses
            ],
            None,
        )


def _with_images(sequence: TokenizedResponse, images: PromptImages) -> TokenizedResponse:
    if scored_tokens(sequence):
        return replace(sequence, images=images)
    # A prompt that fills the length may have lost tokens of its images, which no model takes.
    return TokenizedResponse(sequence.input_ids[:2], 2)


def _truncate(
    ids: list[int], start: int, max_length: int | None, mode: TruncationMode
) -> TokenizedResponse:
    if max_length is None or len(ids) <= max_length:
        return TokenizedResponse(ids, start)
    if mode == "keep_start":
        return TokenizedResponse(ids[:max_length], min(start, max_length))
    return TokenizedResponse(ids[-max_length:], max(0, start - (len(ids) - max_length)))


def _common_prefix_length(ids: list[int], others: list[int]) -> int:
    if others[: len(ids)] == ids:
        return len(ids)
    differing = (n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b)
    return next(differing, len(others))
