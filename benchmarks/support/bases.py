"""The weights that an adapter stands on: dtypes, attention kernels, quantization.

All are of one tiny Llama. What quantizes it is in packages that need not be installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.support.adapters import adapted
from benchmarks.support.architectures import Architecture
from benchmarks.support.cells import Cell, measure

_LLAMA = Architecture("Llama", dict(hidden_size=64, head_dim=16, intermediate_size=128))
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# As the table calls them, and as `adapted` does.
ADAPTERS_ON_BASES = {
    "LoRA": "LoRA, attention",
    "DoRA": "DoRA, attention",
    "LoRA and modules_to_save": "LoRA and modules_to_save",
}


@dataclass(frozen=True)
class Base:
    """Weights in some form.

    Attributes:
        load: loads them from the folder of a saved model in float32.
        package: what has to be installed for that.
        training: whether the definition needs training mode (there is no dropout): checkpointing
            acts in it alone, and bitsandbytes' 4-bit layers have gradients in it alone.
    """

    load: Callable[[Path], PreTrainedModel]
    package: str | None = None
    training: bool = False

    @property
    def versions(self) -> dict[str, str]:
        return {} if self.package is None else {self.package: metadata.version(self.package)}

    @property
    def installed(self) -> bool:
        try:
            return bool(self.versions) or self.package is None
        except metadata.PackageNotFoundError:
            return False


def measure_base(base: Base, adapter: str, folder: Path) -> Cell:
    """Return the cell of an adapter, one of `ADAPTERS_ON_BASES`, on `base`.

    Args:
        folder: where the model is saved, if it is not there yet.
    """
    if not (folder / "config.json").exists():
        _LLAMA.build().save_pretrained(folder)
    plain: list[PreTrainedModel] = []

    def make() -> nn.Module:
        model = base.load(folder).train(base.training)
        plain.append(_plain(model))
        return adapted(model, ADAPTERS_ON_BASES[adapter], _LINEAR).train(base.training)

    def exact(model: nn.Module) -> nn.Module:
        found = adapted(plain[0], ADAPTERS_ON_BASES[adapter], _LINEAR).double()
        trained = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(trained[name])
        return found

    return measure(make, exact)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same model in float32, with the weights that a quantized one stands for."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    given = dict(model.named_parameters())
    embeddings: Any = model.get_input_embeddings()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                unit = torch.eye(module.in_features, dtype=embeddings.weight.dtype)
                module.weight.copy_(model.get_submodule(name)(unit).mT)
            else:
                for own, parameter in module.named_parameters(name, recurse=False):
                    parameter.copy_(given[own])
    return plain.eval()


def _loaded(**options: Any) -> Callable[[Path], PreTrainedModel]:
    def load(folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})

    return load


def _checkpointed(folder: Path) -> PreTrainedModel:
    model = _loaded()(folder)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model


def _bitsandbytes(dtype: torch.dtype = torch.float32, **options: Any) -> Base:
    four = "load_in_4bit" in options
    if four:
        options["bnb_4bit_compute_dtype"] = dtype

    def load(folder: Path) -> PreTrainedModel:
        config = transformers.BitsAndBytesConfig(**options)
        return _loaded(quantization_config=config, dtype=dtype)(folder)

    return Base(load, "bitsandbytes", training=four)


def _torchao(kind: str, weights: str | None = None) -> Base:
    def load(folder: Path) -> PreTrainedModel:
        from torchao import quantization

        options = {} if weights is None else {"weight_dtype": getattr(torch, weights)}
        config = transformers.TorchAoConfig(getattr(quantization, f"{kind}Config")(**options))
        return _loaded(quantization_config=config)(folder)

    return Base(load, "torchao")


def _quanto(folder: Path) -> PreTrainedModel:
    return _loaded(quantization_config=transformers.QuantoConfig(weights="int8"))(folder)


def _hqq(folder: Path) -> PreTrainedModel:
    """By HQQ's own call: transformers 5 does not quantize with it."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = _loaded()(folder)
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
    return model


def _gguf(kind: str) -> Base:
    """A GGUF file, which transformers dequantizes on loading."""

    def load(folder: Path) -> PreTrainedModel:
        _write_gguf(folder, kind)
        config = transformers.GgufConfig(dequantize=True)
        return _loaded(gguf_file=f"{kind}.gguf", quantization_config=config)(folder)

    return Base(load, "gguf")


def _write_gguf(folder: Path, kind: str) -> None:
    import gguf

    model = _loaded()(folder)
    config = model.config
    writer = gguf.GGUFWriter(folder / f"{kind}.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    quantized = getattr(gguf.GGMLQuantizationType, kind)
    for name, weight in model.state_dict().items():
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None, f"GGUF has no name for {name}"
        if any(part in name for part in _LINEAR):
            writer.add_tensor(known, gguf.quantize(weight.numpy(), quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(known, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BASES: dict[str, Base] = {
    "float32, SDPA attention": Base(_loaded(attn_implementation="sdpa")),
    "float32, eager attention": Base(_loaded(attn_implementation="eager")),
    "float32, gradient checkpointing": Base(_checkpointed, training=True),
    "bfloat16": Base(_loaded(dtype=torch.bfloat16)),
    "bfloat16, eager attention": Base(_loaded(dtype=torch.bfloat16, attn_implementation="eager")),
    "float16": Base(_loaded(dtype=torch.float16)),
    "bitsandbytes, 8 bits": _bitsandbytes(load_in_8bit=True),
    "bitsandbytes, NF4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes, NF4 twice, in bfloat16": _bitsandbytes(
        torch.bfloat16, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes, FP4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "torchao, int8 weights": _torchao("Int8WeightOnly"),
    "torchao, int4 weights": _torchao("IntxWeightOnly", "int4"),
    "torchao, float8 weights": _torchao("Float8WeightOnly"),
    "torchao, int8 weights and activations": _torchao("Int8DynamicActivationInt8Weight"),
    "HQQ, 4 bits": Base(_hqq, "hqq"),
    "quanto, int8 weights": Base(_quanto, "optimum-quanto"),
    "GGUF, Q8_0": _gguf("Q8_0"),
    "GGUF, Q4_0": _gguf("Q4_0"),
}
