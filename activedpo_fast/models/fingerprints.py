"""What a policy in memory depends on, as JSON values that tell it from another one.

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

# Of a model's config: where it came from, and what changes no number.
_NOT_THE_MODEL = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label",
    "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "return_dict",
    "torch_dtype", "transformers_version", "use_cache",
})
# Of an adapter's: the same, and what has had its effect when the weights are made.
_NOT_THE_ADAPTER = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
})


def policy_settings(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """`lora`, `base` and `tokenizer`: settings that a run compares when it is resumed.

    The weights of the adapter, which training changes, are not among them.

    Raises:
        ActiveDPOError: no adapter "default".
    """
    if _ADAPTER not in model.peft_config:
        raise ActiveDPOError(f"the model has no adapter called {_ADAPTER!r}, the one that is "
                             f"trained; it has {', '.join(model.peft_config)}")
    base: Any = model.get_base_model()
    eos = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    adapter = {name: value for name, value in model.peft_config[_ADAPTER].to_dict().items()
               if name not in _NOT_THE_ADAPTER}
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
    """SHA-256 (128 bits, hex) of named tensors: names, shapes, dtypes and values.

    Of the values the sum of all bits, taken as integers, and up to 16 blocks of 16 KiB spread
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
    """`special_tokens`, and hashes of the `vocabulary` (with its rules) and `chat_template`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        # Left there by the last call that padded or cut.
        parts.pop("padding", None)
        parts.pop("truncation", None)
    else:
        parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()),
                 _file_hash(getattr(tokenizer, "vocab_file", None))]
    template = tokenizer.chat_template
    return {
        "special_tokens": _json(tokenizer.special_tokens_map),
        "chat_template": None if template is None else _hash(template),
        "vocabulary": _hash(parts),
    }


def is_untrained(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether an adapter's weights are those of a fresh LoRA, which leaves the model as it is.

    One of the two matrices of every pair is zero.
    """
    zero: dict[str, bool] = {}
    for name, tensor in state.items():
        module, found, _ = name.rpartition(".lora_")
        if not found:
            return False
        zero[module] = zero.get(module, False) or not bool(tensor.any())
    return all(zero.values())


def _frozen(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The base model's parameters and saved buffers, by names that do not tell LoRA's targets."""
    # Buffers that are not saved are left out: a forward pass may change them (rotary frequencies).
    for name, tensor in model.get_base_model().state_dict(keep_vars=True).items():
        adapter = "lora_" in name or ".modules_to_save." in name
        if isinstance(tensor, torch.Tensor) and not (adapter or tensor.requires_grad):
            plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            yield plain, tensor


def _samples(tensor: torch.Tensor) -> Iterator[bytes]:
    if hasattr(tensor, "__tensor_flatten__"):  # made of several tensors, as torchao's are
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
    yield torch.cat([bits[start:start + size] for start in starts]).cpu().numpy().tobytes()


def _dtypes(tensors: Iterable[torch.Tensor]) -> str:
    """Their dtype; where they have several, all of them."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _without(config: dict[str, Any]) -> dict[str, Any]:
    """A config, and those within it, without `_NOT_THE_MODEL` and private keys."""
    return {
        name: _without(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _NOT_THE_MODEL and not str(name).startswith("_")
    }


def _json(value: Any) -> Any:
    """`value` with sets sorted, as JSON gives it back; what JSON has no word for as text."""
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
