"""Fingerprints of a policy in memory, as JSON values that distinguish it from another one.

Everything here is the same on every device, and does not change while the policy is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from activedpo_fast.errors import ActiveDPOError

_ADAPTER = "default"
_BLOCKS = 16
_BLOCK_BYTES = 1 << 14

# Model config keys that only say where it came from, or that change no number.
_NOT_THE_MODEL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
# The same for an adapter's config, plus keys that only affect the creation of the weights.
_NOT_THE_ADAPTER = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
)


def policy_settings(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return `lora`, `base` and `tokenizer`: settings that a run compares when it is resumed.

    The adapter's weights, which training changes, are not included.

    Raises:
        ActiveDPOError: no adapter "default".
    """
    if _ADAPTER not in model.peft_config:
        raise ActiveDPOError(
            f"the model has no adapter called {_ADAPTER!r}, the one that is "
            f"trained; it has {', '.join(model.peft_config)}"
        )
    base: Any = model.get_base_model()
    eos = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    adapter = {
        name: value
        for name, value in model.peft_config[_ADAPTER].to_dict().items()
        if name not in _NOT_THE_ADAPTER
    }
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return {
        "lora": _json({**adapter, "dtype": _dtypes(trained)}),
        "base": {
            "dtype": _dtypes(tensor for _, tensor in _frozen(model)),
            "config": _json(_without(base.config.to_dict())),
            "generation_config": {"eos_token_id": eos},
            "weights": fingerprint_weights(_frozen(model)),
        },
        "tokenizer": tokenizer_settings(tokenizer),
    }


def fingerprint_weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 (128 bits, hex) of named tensors: names, shapes, dtypes and values.

    The values enter as the sum of all bits, read as integers, and up to 16 blocks of 16 KiB spread
    evenly over each tensor. One changed number changes the sum.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda entry: entry[0]):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        if tensor.device.type != "meta":
            for part in _samples(tensor.detach()):
                digest.update(part)
    return digest.hexdigest()[:32]


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return `special_tokens`, and hashes of `vocabulary` (with its rules) and `chat_template`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        # Left over from the last call that padded or truncated.
        parts.pop("padding", None)
        parts.pop("truncation", None)
    else:
        parts = [
            type(tokenizer).__name__,
            sorted(tokenizer.get_vocab().items()),
            _file_hash(getattr(tokenizer, "vocab_file", None)),
        ]
    template = tokenizer.chat_template
    return {
        "special_tokens": _json(tokenizer.special_tokens_map),
        "chat_template": None if template is None else _hash(template),
        "vocabulary": _hash(parts),
    }


def is_untrained(state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether an adapter's weights are those of a fresh LoRA, which has no effect.

    In a fresh LoRA, one of the two matrices of every pair is zero.
    """
    zero: dict[str, bool] = {}
    for name, tensor in state.items():
        module, found, _ = name.rpartition(".lora_")
        if not found:
            return False
        zero[module] = zero.get(module, False) or not bool(tensor.any())
    return all(zero.values())


def _frozen(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the base model's parameters and saved buffers, by names without LoRA's additions."""
    # Buffers that are not saved are left out: a forward pass may change them (rotary frequencies).
    for name, tensor in model.get_base_model().state_dict(keep_vars=True).items():
        adapter = "lora_" in name or ".modules_to_save." in name
        if isinstance(tensor, torch.Tensor) and not (adapter or tensor.requires_grad):
            plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            yield plain, tensor


def _samples(tensor: torch.Tensor) -> Iterator[bytes]:
    if hasattr(tensor, "__tensor_flatten__"):  # composed of several tensors, as in torchao
        for name in tensor.__tensor_flatten__()[0]:
            yield from _samples(getattr(tensor, name))
        return
    flat = tensor.contiguous().flatten()
    if flat.numel() == 0:
        return
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.view(integers.get(flat.element_size(), torch.uint8))
    yield str(int(bits.sum(dtype=torch.int64))).encode()
    size = max(1, _BLOCK_BYTES // bits.element_size())
    if len(bits) <= size * _BLOCKS:
        yield bits.cpu().numpy().tobytes()
        return
    last = len(bits) - size
    starts = [last * n // (_BLOCKS - 1) for n in range(_BLOCKS)]
    yield torch.cat([bits[start : start + size] for start in starts]).cpu().numpy().tobytes()


def _dtypes(tensors: Iterable[torch.Tensor]) -> str:
    """Return the dtype of the tensors, or all dtypes if there are several."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _without(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config, and those nested in it, without `_NOT_THE_MODEL` and private keys."""
    return {
        name: _without(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _NOT_THE_MODEL and not str(name).startswith("_")
    }


def _json(value: Any) -> Any:
    """Return `value` after a JSON round trip: sets sorted, non-JSON values as text."""

    def other(value: Any) -> Any:
        return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)

    return json.loads(json.dumps(value, default=other))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _file_hash(path: Any) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]
    except OSError:
        return None
