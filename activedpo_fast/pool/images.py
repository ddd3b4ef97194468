"""The images of prompts.

A row has them in the columns `image` or `images`, as `trl.DPOTrainer` takes them. In a pool each is
a part of the prompt, `{"type": "image", "image": ...}`, and a text: the path of a file, or a data
URI that has the file itself. So two prompts that differ in an image alone are two prompts
everywhere: in ids, files of labels and fingerprints.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from activedpo_fast._files import first_line
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.columns import is_absent
from activedpo_fast.pool.files import IMAGE_COLUMNS
from activedpo_fast.pool.messages import text_part
from activedpo_fast.pool.texts import show

_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
_EXPECTED = "expected a path, a PIL image, or an object with 'bytes' or 'path'"


def prompt_with_images(prompt: Any, row: Mapping[str, Any], place: str) -> Any:
    """Return a row's prompt with the images of its columns `image` or `images` in their places.

    These are its parts `{"type": "image"}`, in order. If there are none, the images come before the
    user's first message that is a string, as in TRL.

    Raises:
        ActiveDPOError: a prompt of plain text, another number of parts than of images, both
            columns, or something that is no image.
    """
    images = _images_of_row(row, place)
    if images is None:
        return prompt
    if isinstance(prompt, str) and images:
        raise ActiveDPOError(
            f"{place}: images need a prompt of chat messages, as a part of one: "
            '[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}]'
        )
    if not isinstance(prompt, list):
        return prompt  # refused by `check_text`
    waiting = list(images)
    filled = [_filled(message, waiting) for message in _with_places(prompt, len(images))]
    places = sum(_is_place(part) for message in filled for part in _parts(message))
    if waiting or places:
        raise ActiveDPOError(
            f"{place}: the prompt has {len(images) - len(waiting) + places} parts "
            f'{{"type": "image"}}, but the row has {len(images)} images'
        )
    return filled


def open_image(image: str, place: str) -> Any:
    """Return the `PIL.Image.Image` of a path or a data URI, read.

    Raises:
        ActiveDPOError: Pillow is missing; there is no such file; it is no image.
    """
    import datasets  # slow to import

    content = image_bytes(image, place)
    file = {"bytes": content, "path": image if content is None else None}
    try:
        return datasets.Image().decode_example(file)  # as for DPOTrainer
    except ImportError:
        raise ActiveDPOError("images need Pillow: pip install pillow") from None
    except Exception as error:  # a broken image can raise anything
        raise ActiveDPOError(
            f"{place}: {shown_image(image)} cannot be read as an image: {first_line(error)}"
        ) from None


def image_bytes(image: str, place: str) -> bytes | None:
    """Return the file that a data URI holds; None for a path, whose file has to exist.

    Raises:
        ActiveDPOError: a broken data URI; a path without a file.
    """
    if not image.startswith("data:"):
        if not os.path.isfile(image):
            raise ActiveDPOError(f"{place}: there is no image file {image}")
        return None
    head, _, content = image.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error):
        raise ActiveDPOError(f"{place}: an image is a data URI that is no base64") from None


def shown_image(image: str) -> str:
    return "an image in a data URI" if image.startswith("data:") else image


def _images_of_row(row: Mapping[str, Any], place: str) -> list[str] | None:
    given = {name: row[name] for name in IMAGE_COLUMNS if not is_absent(row.get(name))}
    if not given:
        return None
    if len(given) == 2:
        raise ActiveDPOError(f"{place}: has both columns 'image' and 'images': leave out one")
    [(name, value)] = given.items()
    if name == "image":
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ActiveDPOError(f"{place}: the column 'images' must be a list, got {show(value)}")
    return [image_as_text(image, f"{place}: the column {name!r}") for image in value]


def image_as_text(image: Any, place: str) -> str:
    """Return an image as a pool has it: a path, or a data URI.

    Args:
        image: a path, a PIL image, the bytes of a file, or an object with `bytes` or `path`, as
            `datasets.Image(decode=False)` gives.

    Raises:
        ActiveDPOError: naming `place`, an address on the network, or anything else.
    """
    if isinstance(image, Mapping):
        content, path = image.get("bytes"), image.get("path")
        image = content if content is not None else path
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if isinstance(image, str) and image.strip():
        if image.lower().startswith(("http://", "https://")):
            raise ActiveDPOError(
                f"{place}: {image} is an address on the network: download the image, and give its "
                "path"
            )
        return image
    if not isinstance(image, bytes):
        if not hasattr(image, "save") or not hasattr(image, "getbands"):
            raise ActiveDPOError(f"{place}: {_EXPECTED}, got {show(image)}")
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        image = buffer.getvalue()
    kind = next((kind for start, kind in _KINDS.items() if image.startswith(start)), "*")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _with_places(prompt: list[Any], count: int) -> list[Any]:
    """Return messages with places for images: their own, or `count` of them before the user's first
    message that is a string."""
    messages = list(prompt)
    if any(_is_place(part) for message in messages for part in _parts(message)):
        return messages
    for n, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            content = message.get("content")
            if count and isinstance(content, str):
                parts = [*[{"type": "image"} for _ in range(count)], text_part(content)]
                messages[n] = {**message, "content": parts}
                break
    return messages


def _filled(message: Any, waiting: list[str]) -> Any:
    """Return a message with images of `waiting` in its places, taken from there."""
    if not _parts(message):
        return message
    return {
        **message,
        "content": [
            {**part, "image": waiting.pop(0)} if _is_place(part) and waiting else part
            for part in message["content"]
        ],
    }


def _parts(message: Any) -> Sequence[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list) or message.get("role") == "tool":
        return ()
    return content


def _is_place(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image" and "image" not in part
