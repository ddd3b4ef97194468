"""Token ids of prompts with images, and what the model gets for the images.

The rules are those of TRL's `DataCollatorForVisionPreference`, which differ from those of texts:

* Prompt and prompt + response are rendered as texts by the processor's chat template. What they
  have in common is the prompt, the rest is the response.
* The processor tokenizes the prompt with its images, and the response apart from it, without the
  tokenizer's own special tokens.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from activedpo_fast._files import first_line, read_bytes
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.images import image_bytes, open_image
from activedpo_fast.pool.items import PoolItem
from activedpo_fast.pool.messages import Message, images_of, text_part, without_images
from activedpo_fast.pool.template import NOT_WITH_TOOLS, TOOLS, template_kwargs

logger = logging.getLogger(__name__)

ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin

# Of every token; a response's are 0.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, eq=False)
class PromptImages:
    """A rendered prompt and its images, from which the model's inputs are made at every use: the
    pixels of a pool would fill the memory.

    Attributes:
        processor: of the model.
        text: the prompt, with the processor's placeholders.
        images: paths or data URIs, in the order of the placeholders.
        place: for error messages.
    """

    processor: ProcessorMixin
    text: str
    images: tuple[str, ...]
    place: str

    def token_ids(self) -> list[int]:
        """Return the ids of the prompt, with all tokens of its images."""
        return [int(id) for id in _processed(self)["input_ids"][0]]

    def digest(self) -> bytes:
        """Return a hash of the files of the images."""
        digest = hashlib.sha256()
        for image in self.images:
            content = image_bytes(image, self.place)
            digest.update(read_bytes(image) if content is None else content)
        return digest.digest()

    def model_inputs(self, length: int) -> dict[str, torch.Tensor]:
        """Return the model's arguments besides the ids and mask of `length` tokens."""
        inputs = {
            name: value
            for name, value in _processed(self).items()
            if name not in ("input_ids", "attention_mask")
        }
        for name in _TOKEN_TYPES & inputs.keys():
            types = inputs[name]
            inputs[name] = torch.nn.functional.pad(types, (0, length - types.shape[1]))
        return inputs


@lru_cache(maxsize=4)
def _processed(prompt: PromptImages) -> Mapping[str, torch.Tensor]:
    """Return what the processor makes of a prompt; the responses of an item often follow each
    other."""
    images = [open_image(image, prompt.place) for image in prompt.images]
    return _call(
        prompt.processor,
        prompt.place,
        text=[prompt.text],
        images=[images] if images else None,
        padding_side="left",
    )


def encode_with_images(
    items: Sequence[PoolItem], processor: ProcessorMixin, common: Mapping[str, Any]
) -> Iterator[tuple[list[int], list[list[int]], PromptImages]]:
    """Yield for each item the ids of its prompt, and of the prompt with each response.

    Raises:
        ActiveDPOError: what the chat template, the processor or `DPOTrainer` refuse; an image that
            cannot be read.
    """
    unequal = 0
    for item in items:
        texts = _rendered(item, processor, template_kwargs(item.extra, common))
        starts = [len(commonprefix([texts[0], text])) for text in texts[1:]]
        start = min(starts)
        unequal += sum(other > start for other in starts) >= 2
        prompt = PromptImages(
            processor, texts[0][:start], tuple(images_of(item.prompt)), f"item {item.id!r}"
        )
        encoded = _call(
            processor, prompt.place, text=[text[start:] for text in texts[1:]], padding_side="right"
        )
        ids = prompt.token_ids()
        responses = [
            response[mask.bool()].tolist()
            for response, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
        ]
        yield ids, [ids + response for response in responses], prompt
    if unequal:
        logger.warning(
            "%d of %d prompts are rendered differently before three or more of their responses; "
            "all start where the first of them does, while DPOTrainer starts some pairs later",
            unequal,
            len(items),
        )


def _rendered(item: PoolItem, processor: ProcessorMixin, arguments: dict[str, Any]) -> list[str]:
    """Return the texts of the prompt, and of the prompt with each response."""
    place = f"item {item.id!r}"
    if arguments.get(TOOLS) is not None:
        raise ActiveDPOError(f"{place}: {NOT_WITH_TOOLS}")
    prompt = in_parts(without_images(item.prompt), place)
    last = prompt[-1]["role"]
    if last == "system":
        raise ActiveDPOError(
            f"{place}: the prompt ends with a message of the system, which DPOTrainer refuses for "
            "rows with images"
        )
    goes_on = last == "assistant"
    begins = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}

    def render(messages: list[Message], **more: Any) -> str:
        try:
            return str(processor.apply_chat_template(messages, tokenize=False, **more, **arguments))
        except Exception as error:  # a template is code and can raise anything
            raise ActiveDPOError(
                f"{place}: the chat template failed: {first_line(error)}"
            ) from error

    return [
        render(prompt, **begins),
        *(render([*prompt, *in_parts(response, place)]) for response in item.responses),
    ]


def in_parts(messages: str | list[Message], place: str) -> list[Message]:
    """Return messages whose contents are all in parts, as TRL gives them to processors."""
    found = []
    for message in messages:
        assert isinstance(message, dict)
        if message["role"] not in _ROLES:
            raise ActiveDPOError(
                f"{place}: a message of the role {message['role']!r}, which DPOTrainer refuses for "
                f"processors: use one of {', '.join(_ROLES)}"
            )
        content = message.get("content")
        if isinstance(content, str):
            message = {**message, "content": [text_part(content)]}
        found.append(message)
    return found


def _call(processor: Any, place: str, **inputs: Any) -> Mapping[str, torch.Tensor]:
    try:
        encoded: Mapping[str, torch.Tensor] = processor(
            padding=True, return_tensors="pt", add_special_tokens=False, **inputs
        )
    except Exception as error:  # such as another number of placeholders than of images
        raise ActiveDPOError(
            f"{place}: {type(processor).__name__} refuses it: {first_line(error)}"
        ) from error
    return encoded
