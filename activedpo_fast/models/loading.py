"""Loading a policy and its tokenizer from files: base model, LoRA adapter, dtype and device.

Only safetensors and GGUF weights are read, and no code from a checkpoint is run.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto as auto

from activedpo_fast._files import FilePath, first_line, read_json
from activedpo_fast._random import forked_rng
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.encoder_decoder import is_encoder_decoder
from activedpo_fast.models.folders import (
    ADAPTER_WEIGHTS,
    TokenizerSource,
    check_adapter_folder,
    resolve_source,
    tokenizer_source,
)

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NO_ADAPTER = (
    "no adapter: pass --adapter DIR; a fresh LoRA adapter can be made with "
    "peft.get_peft_model(...).save_pretrained(DIR)"
)
_HALF = (torch.bfloat16, torch.float16)
_KINDS: dict[Any, str] = {
    AutoModelForCausalLM: "causal language",
    AutoModelForSeq2SeqLM: "encoder-decoder language",
    AutoModelForImageTextToText: "vision-language",
    AutoModelForSequenceClassification: "sequence classification",
}


def load_policy(
    model: FilePath,
    *,
    adapter: FilePath | None = None,
    lora: dict[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    gguf_file: str | None = None,
    seed: int = 0,
    tokenizer: FilePath | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the model in training, in eval mode, and its tokenizer.

    The tokenizer is the adapter's if its folder has one (training tools save it there), otherwise
    the base model's. Using the adapter's tokenizer is logged. A vision-language model is loaded
    whole, with its processor's tokenizer, for texts.

    Args:
        model: a folder in transformers' format with safetensors weights, or a name on the hub.
        adapter: a folder written by `PeftModel.save_pretrained`; it is loaded as trainable.
        lora: arguments of `peft.LoraConfig` for a fresh adapter instead.
        dtype: of the base model's weights: "float32", "float64", "bfloat16", "float16", or "auto".
            "auto" is the checkpoint's own (float32 for GGUF), except that half-precision
            checkpoints are loaded as float32 on the CPU.
        device: "auto" (cuda if available, else cpu), or a torch device.
        gguf_file: name of a GGUF file in `model`, which is dequantized on loading.
        seed: for the fresh adapter's A matrices.
        tokenizer: a folder, or a name on the hub, whose tokenizer is used instead.

    Returns:
        The PEFT model and the tokenizer; without a pad token it pads with EOS, as in TRL.

    Raises:
        ActiveDPOError: no such folder, no language model that writes text, weights that are missing
            or do not match, neither `adapter` nor `lora`, or both; a tokenizer with tokens that the
            model has no embedding for.
    """
    if (adapter is None) == (lora is None):
        raise ActiveDPOError(
            "give either an adapter or the settings of a fresh LoRA, not both"
            if lora is not None
            else NO_ADAPTER
        )
    policy, loaded = load_model(
        model,
        adapter=adapter,
        lora=lora,
        dtype=dtype,
        device=device,
        gguf_file=gguf_file,
        seed=seed,
        tokenizer=tokenizer,
    )
    return cast(PeftModel, policy), loaded


def load_model(
    model: FilePath,
    *,
    adapter: FilePath | None = None,
    lora: dict[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    gguf_file: str | None = None,
    seed: int = 0,
    tokenizer: FilePath | PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """As `load_policy`; with neither `adapter` nor `lora`, the base model alone, all of it frozen.

    Args:
        tokenizer: may also be one in memory, which is returned as it is; none is read then.
    """
    source = resolve_source(model, gguf_file)
    if adapter is not None:
        check_adapter_folder(Path(adapter))
    on = resolve_device(device)
    torch_dtype = resolve_dtype(model, dtype, on, gguf_file)

    words = None
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        words = tokenizer_source(model, adapter, tokenizer, gguf_file)
        loaded = _load_tokenizer(words.folder, gguf_file if words.whose == "model" else None)
    else:
        loaded = tokenizer
    base = _load_base(source, torch_dtype, gguf_file)
    if adapter is not None:
        _check_embeddings(base, Path(adapter))  # before its tokenizer, which then has more tokens
    if words is not None:
        _check_vocabulary(loaded, words, base, source, gguf_file)
    policy: Any
    if adapter is not None:
        policy = _with_adapter(base, Path(adapter))
    elif lora is not None:
        policy = _with_fresh_lora(base, lora, seed)
    else:
        policy = base.requires_grad_(False)
    if torch_dtype == torch.float64:
        policy.double()  # PEFT makes and loads adapters in float32
    if words is not None and words.whose == "adapter":
        logger.info(
            "tokenizer: that of the adapter, %s (set tokenizer to use another)", words.folder
        )
    return policy.to(on).eval(), loaded


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    source: TokenizerSource,
    base: PreTrainedModel,
    folder: Path,
    gguf_file: str | None,
) -> None:
    """Refuse tokens beyond the embedding that the base model's own tokenizer does not have.

    Some models' tokenizers have more tokens (for images, for example) that no text produces.
    """
    rows = int(cast(Any, base.get_input_embeddings()).weight.shape[0])
    beyond = {token: id for token, id in tokenizer.get_vocab().items() if id >= rows}
    if not beyond:
        return
    used = [
        token
        for token in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token)
        if token in beyond
    ]
    if not used and source.whose != "model":
        own = _load_tokenizer(folder, gguf_file).get_vocab()
        used = [token for token in beyond if token not in own]
    if used:
        token = min(used, key=lambda token: beyond[str(token)])
        raise ActiveDPOError(
            f"the tokenizer in {source.folder} does not fit the model: {token!r} has the id "
            f"{beyond[str(token)]}, the embedding {rows} rows; give a tokenizer that fits "
            "(--tokenizer DIR), or resize the base model's embedding and save it as the adapter's "
            "base"
        )


def load_reward_model(
    model: FilePath, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classification model, in eval mode, and its tokenizer.

    Errors are as in `load_policy`.
    """
    source = resolve_source(model, None)
    on = resolve_device(device)
    reward: Any = _load_weights(
        AutoModelForSequenceClassification,
        source,
        resolve_dtype(model, "auto", on),
        use_safetensors=True,
    )
    return reward.to(on).eval(), _load_tokenizer(source, None)


def resolve_device(device: str) -> torch.device:
    """Return the torch device that `device` names; "auto" is cuda if available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ActiveDPOError(f"device {device!r} cannot be used: {first_line(error)}") from None
    return found


def resolve_dtype(
    model: FilePath, dtype: str, device: torch.device, gguf_file: str | None = None
) -> torch.dtype:
    """Return the base model's dtype on `device`; see `load_policy`. Reads no weights."""
    if dtype != "auto":
        if dtype not in DTYPES:
            known = ", ".join(["auto", *DTYPES])
            raise ActiveDPOError(f"unknown dtype {dtype!r}; known: {known}")
        return DTYPES[dtype]
    if gguf_file is not None:
        return torch.float32
    found = _checkpoint_dtype(resolve_source(model, None))
    if found in _HALF and device.type == "cpu":
        logger.info(
            "the checkpoint is %s: loading it as float32, which is faster and more precise "
            "on the CPU (set dtype to override)",
            str(found).removeprefix("torch."),
        )
        return torch.float32
    return found


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each kind of model checks its own settings
        raise ActiveDPOError(
            f"{folder} is not a model that can be loaded: {first_line(error)}"
        ) from None


def _checkpoint_dtype(folder: Path) -> torch.dtype:
    config = _config(folder)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for path in sorted(folder.glob("*.safetensors")):
        dtype = _first_dtype(path)
        if dtype is not None:
            return dtype
    return torch.float32


def _first_dtype(path: Path) -> torch.dtype | None:
    """Return the dtype of the first floating tensor in a safetensors file."""
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():
                dtype: torch.dtype = tensors.get_slice(name)[:0].dtype
                if dtype.is_floating_point:
                    return dtype
    except (OSError, SafetensorError) as error:
        raise ActiveDPOError(f"{path} cannot be read: {first_line(error)}") from error
    return None


def _load_tokenizer(folder: Path, gguf_file: str | None) -> PreTrainedTokenizerBase:
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **extra)
    except Exception as error:  # tokenizer files are parsed by several libraries
        reason = first_line(error)
        if reason.endswith(":"):  # followed by a list of the ways that transformers supports
            reason = "none of the files that transformers reads the vocabulary from is in it"
        raise ActiveDPOError(f"{folder} has no tokenizer that can be loaded: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(folder)
    return tokenizer


def _processor_template(folder: Path) -> str | None:
    """Return the chat template in the file of earlier processors, which tokenizers do not read."""
    file = folder / "chat_template.json"
    found = read_json(file) if file.is_file() else None
    template = found.get("chat_template") if isinstance(found, dict) else None
    return template if isinstance(template, str) else None


def _load_base(folder: Path, dtype: torch.dtype, gguf_file: str | None) -> PreTrainedModel:
    options: dict[str, Any] = {"use_safetensors": True}
    auto_class: Any = AutoModelForCausalLM
    if gguf_file is not None:
        from transformers import GgufConfig

        options = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    elif getattr(_config(folder), "is_encoder_decoder", False):
        auto_class = AutoModelForSeq2SeqLM
    elif _is_vision_language(_config(folder)):
        auto_class = AutoModelForImageTextToText
    model: PreTrainedModel = _load_weights(auto_class, folder, dtype, **options)
    return model


def _is_vision_language(config: Any) -> bool:
    """Return whether transformers has the model, but not among its causal language models."""
    return (
        config.model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        and config.model_type not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and not getattr(config, "is_encoder_decoder", False)
    )


def _load_weights(auto_class: Any, folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    what = _KINDS[auto_class]
    try:
        model, info = auto_class.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # files of others, parsed by several libraries
        raise ActiveDPOError(
            f"{folder} is not a {what} model that can be loaded: {first_line(error)}"
        ) from error
    # transformers fills missing weights with random numbers.
    missing = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
    if missing and "gguf_file" not in options:
        raise ActiveDPOError(
            f"{folder} is not a complete {what} model: {missing[0]!r} and "
            f"{len(missing) - 1} other weights are missing or do not match"
        )
    return model


def _with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # This becomes an error below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            policy = PeftModel.from_pretrained(base, folder, is_trainable=True)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
            in_file = set(tensors.keys())
    except Exception as error:  # PEFT checks an adapter's settings in many places
        raise ActiveDPOError(
            f"adapter {folder} does not fit the model: {_reason(error)}"
        ) from error
    # PEFT leaves missing weights at their initialization and drops unexpected ones.
    in_model = set(get_peft_model_state_dict(policy, save_embedding_layers=False))
    # A file may also have the base model's embeddings.
    beyond = {name for name in in_file - in_model if "lora_" in name}
    for who, names in (("its file", in_model - in_file), ("the model", beyond)):
        if names:
            raise ActiveDPOError(
                f"adapter {folder} does not fit the model: {who} lacks {min(names)!r} and "
                f"{len(names) - 1} others"
            )
    return policy


def _check_embeddings(base: PreTrainedModel, folder: Path) -> None:
    """Refuse an adapter whose embedding or head has another number of rows than the model's."""
    own = {
        id(module): len(cast(Any, module).weight)
        for module in (base.get_input_embeddings(), base.get_output_embeddings())
        if module is not None
    }
    rows = {name: own[id(module)] for name, module in base.named_modules() if id(module) in own}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
            for key in tensors.keys():
                name = key.removeprefix("base_model.model.").removesuffix(".weight")
                found = rows.get(name.removesuffix(".base_layer"))
                shape = tensors.get_slice(key).get_shape()
                if found is not None and len(shape) == 2 and shape[0] != found:
                    raise ActiveDPOError(
                        f"adapter {folder} was trained with a resized embedding: {key!r} has "
                        f"{shape[0]} rows, the model {found}; resize the base model as in training "
                        f"(model.resize_token_embeddings({shape[0]})), save it, and pass that "
                        "folder as the model"
                    )
    except (OSError, SafetensorError) as error:
        raise ActiveDPOError(f"adapter {folder} cannot be read: {first_line(error)}") from error


def with_fresh_adapter(base: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """Put a fresh adapter on a model, in place; `seed` is that of its random weights.

    Raises:
        TypeError, ValueError: PEFT refuses the configuration, or it does not fit the model.
    """
    with forked_rng(base.device, seed):
        return cast(PeftModel, get_peft_model(base, config)).train(base.training)


def _with_fresh_lora(base: PreTrainedModel, lora: dict[str, Any], seed: int) -> PeftModel:
    # The names of `LoraConfig`'s arguments are checked where user input is read.
    task = "SEQ_2_SEQ_LM" if is_encoder_decoder(base) else "CAUSAL_LM"
    try:
        return with_fresh_adapter(base, LoraConfig(**{"task_type": task, **lora}), seed)
    except (TypeError, ValueError) as error:
        raise ActiveDPOError(f"lora: {first_line(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the first fault in a state dict, which torch puts after a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in") else first_line(error)
