"""The file of an information matrix: safetensors, with a format number and a checksum."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from activedpo_fast._files import FilePath, atomic_path
from activedpo_fast.errors import ActiveDPOError

_KIND = "activedpo information matrix"
_FORMAT = 1


def write_state(
    path: FilePath, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Write float64 tensors and JSON values to `path`, whole or not at all."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(values, sort_keys=True)
    metadata = {  # safetensors metadata is text only
        "kind": _KIND,
        "format": str(_FORMAT),
        "values": text,
        "checksum": _checksum(tensors, text),
    }
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise ActiveDPOError(f"{path} cannot be written: {error}") from None


def read_state(path: FilePath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_state` wrote.

    Raises:
        ActiveDPOError: no such file, another kind of file or format, or a damaged file.
    """
    if not Path(path).is_file():
        raise ActiveDPOError(f"{path} is not there, or is not a file")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("kind") != _KIND:
                raise ActiveDPOError(f"{path} does not hold an information matrix")
            if metadata.get("format") != str(_FORMAT):
                raise ActiveDPOError(
                    f"{path} is an information matrix of format {metadata.get('format')}, "
                    f"and this version reads format {_FORMAT}"
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise ActiveDPOError(f"{path} cannot be read as an information matrix: {error}") from None
    text = metadata.get("values", "")
    if metadata.get("checksum") != _checksum(tensors, text):
        raise ActiveDPOError(f"{path} is damaged: its checksum is wrong")
    return tensors, json.loads(text)


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """CRC-32 of the text and of every name, shape and value, in the order of the names."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).numpy().data, crc)
    return f"{crc:08x}"
