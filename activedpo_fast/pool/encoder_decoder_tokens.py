"""Token ids for encoder-decoder models: the prompt for the encoder, the response for the decoder.

The rules are those of sequence-to-sequence training with transformers, as TRL's `DPOTrainer` no
longer takes such models:

* The prompt is tokenized alone, with the tokenizer's own special tokens (T5 ends it with EOS).
* The response is tokenized alone, as a target (`text_target`): for mBART and NLLB with the token of
  the target language. If the tokenizer does not add EOS, it is added.
* The decoder reads its start token and then the response.
* A prompt and a response that are together longer than `max_length`, the start token counted, lose
  the response's end. A prompt that alone fills `max_length` is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.items import PoolItem
from activedpo_fast.pool.pool import PreferencePool

logger = logging.getLogger(__name__)

_ITEMS_A_BATCH = 256


def label_ids(processing_class: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each response, which the decoder has to predict, with EOS."""
    eos, eos_id = processing_class.eos_token, processing_class.eos_token_id
    bare = [text.removesuffix(str(eos)) for text in texts]
    encoded = [list(ids) for ids in processing_class(text_target=bare)["input_ids"]]
    (of_nothing,) = processing_class(text_target=[""])["input_ids"]
    if eos_id in of_nothing:
        return encoded
    return [[*ids, int(eos_id)] for ids in encoded]


def encode_for_decoder(
    pool: PreferencePool, processing_class: PreTrainedTokenizerBase, decoder_start_token_id: int
) -> Iterator[tuple[list[int], list[list[int]], None]]:
    """Yield what `tokenize_pool` truncates: each item's prompt, it with each response, no images.

    The prompt ends with the decoder's start token. All responses start after it.

    Raises:
        ActiveDPOError: chat messages; a prompt without tokens.
    """
    if pool.is_chat:
        raise ActiveDPOError(
            "the pool has chat messages, and encoder-decoder models are supported with plain text "
            "alone: make prompts and responses strings"
        )
    for begin in range(0, len(pool), _ITEMS_A_BATCH):
        items: list[PoolItem] = list(pool[begin : begin + _ITEMS_A_BATCH])
        prompts = processing_class(text=[str(item.prompt) for item in items])["input_ids"]
        responses = (str(response) for item in items for response in item.responses)
        labels = iter(label_ids(processing_class, list(responses)))
        for item, prompt in zip(items, prompts, strict=True):
            if not prompt:
                raise ActiveDPOError(f"item {item.id!r}: the prompt has no token")
            start = [*prompt, decoder_start_token_id]
            yield start, [[*start, *next(labels)] for _ in item.responses], None
