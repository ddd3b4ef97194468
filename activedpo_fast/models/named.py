"""A model given by name where an object is expected, as TRL's trainers take one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from activedpo_fast._files import FilePath, first_line, read_json
from activedpo_fast._modes import in_own_modes
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.folders import ADAPTER_CONFIG, check_adapter_folder, local_folder
from activedpo_fast.models.loading import load_model, load_reward_model, with_fresh_adapter
from activedpo_fast.pool.vision import ProcessingClass

GivenModel = PreTrainedModel | PeftModel | FilePath
"""A model, or its name: a folder of a model or of an adapter, or a name on the hub."""


def is_name(model: Any) -> bool:
    return isinstance(model, (str, os.PathLike))


@in_own_modes  # weights made in the caller's inference mode could have no gradient
def as_model(
    model: GivenModel,
    processing_class: ProcessingClass | None = None,
    *,
    peft_config: PeftConfig | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Return a model and its tokenizer or processor; a name is loaded as by the command.

    The name of an adapter (a folder or repository with `adapter_config.json`) stands for the
    adapter, trainable, on the base model that it names, at the revision that it names. The name of
    a model stands for that model, with all of its parameters frozen: nothing says which to train.
    Both are loaded on a GPU if there is one, in eval mode, in the dtype that `load_policy` chooses.

    Args:
        model: returned as it is unless it is a name.
        processing_class: None for the tokenizer that comes with a name: the adapter's, if its
            folder has one, otherwise the model's.
        peft_config: of a fresh adapter for a model that has none; the model in memory is changed
            in place, as `peft.get_peft_model` does.
        seed: of the fresh adapter's random weights.

    Raises:
        ActiveDPOError: a model in memory without a tokenizer; an adapter that does not name its
            base model; what `load_policy` refuses; a `peft_config` of another type, or beside an
            adapter.
    """
    loaded, tokenizer = _loaded(model, processing_class)
    if peft_config is not None:
        loaded = _with_adapter(loaded, peft_config, seed)
    return loaded, tokenizer


def _with_adapter(model: PreTrainedModel | PeftModel, config: PeftConfig, seed: int) -> PeftModel:
    if not isinstance(config, PeftConfig):
        raise ActiveDPOError(
            "peft_config: expected a peft.PeftConfig such as peft.LoraConfig, got "
            f"{type(config).__name__}"
        )
    # `add_adapter` of transformers, and `get_base_model` of PEFT, leave an adapter's layers inside.
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ActiveDPOError(
            "peft_config: the model has an adapter already; leave peft_config out, or pass the "
            "model without its adapter"
        )
    try:
        return with_fresh_adapter(model, config, seed)
    except (TypeError, ValueError) as error:
        raise ActiveDPOError(f"peft_config: {first_line(error)}") from error


def _check_processing_class(given: Any) -> None:
    if not hasattr(getattr(given, "tokenizer", given), "pad_token_id"):
        raise ActiveDPOError(
            "processing_class: expected a tokenizer or processor (AutoTokenizer.from_pretrained "
            f"loads one), got {type(given).__name__}"
        )


def _loaded(model: GivenModel, processing_class: ProcessingClass | None) -> tuple[Any, Any]:
    if not is_name(model):
        if processing_class is None:
            raise ActiveDPOError(
                "processing_class: pass the model's tokenizer; only a model given "
                "by name comes with its own"
            )
        if not isinstance(model, torch.nn.Module):
            raise ActiveDPOError(f"model: expected a model or its name, got {type(model).__name__}")
        _check_processing_class(processing_class)
        return model, processing_class
    if isinstance(processing_class, ProcessorMixin):
        raise ActiveDPOError(
            "model: a vision-language model is not loaded by name: load it "
            "(AutoModelForImageTextToText), and pass it with its processor"
        )
    if processing_class is not None:
        _check_processing_class(processing_class)
    folder = local_folder(model)  # type: ignore[arg-type]
    if not (folder / ADAPTER_CONFIG).is_file():
        return load_model(folder, tokenizer=processing_class)
    return load_model(_base_of(folder), adapter=folder, tokenizer=processing_class)


def as_model_alone(model: GivenModel) -> PreTrainedModel | PeftModel:
    """The same without the tokenizer."""
    return cast(PreTrainedModel | PeftModel, as_model(model)[0] if is_name(model) else model)


def as_policy(
    model: GivenModel,
    processing_class: ProcessingClass | None = None,
    *,
    peft_config: PeftConfig | None = None,
    seed: int = 0,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The same for a model whose adapter is to be trained; one without an adapter is refused."""
    policy, tokenizer = as_model(model, processing_class, peft_config=peft_config, seed=seed)
    if isinstance(tokenizer, ProcessorMixin):
        raise ActiveDPOError(
            f"processing_class: {type(tokenizer).__name__} is a processor, and rounds are of texts "
            "alone: pass its tokenizer; for images, select by ActiveDPOSelector and train by "
            "DPOTrainer"
        )
    if not isinstance(policy, PeftModel):
        name = str(model) if is_name(model) else type(model).__name__
        raise ActiveDPOError(
            f"model: rounds train an adapter, which {name} does not have: pass a "
            "PEFT model, the folder of an adapter, or peft_config for a fresh one"
        )
    return policy, tokenizer


def as_reward_model(
    model: PreTrainedModel | FilePath, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The same for a reward model; a name is loaded by `load_reward_model`."""
    if isinstance(model, (str, os.PathLike)):
        loaded, own = load_reward_model(model)
        return loaded, own if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ActiveDPOError(
            "tokenizer: pass the reward model's; only a model given by name comes with its own"
        )
    return model, tokenizer


def _base_of(adapter: Path) -> Path:
    """Return the folder of the base model that an adapter was made for."""
    check_adapter_folder(adapter)
    config = read_json(adapter / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not (isinstance(name, str) and name):
        raise ActiveDPOError(
            f"adapter {adapter} does not name its base model "
            f"(base_model_name_or_path in {ADAPTER_CONFIG}): load the two, and "
            "pass the model and its tokenizer"
        )
    try:
        return local_folder(name, config.get("revision"))
    except ActiveDPOError as error:
        raise ActiveDPOError(f"the base model of adapter {adapter}: {error}") from None
