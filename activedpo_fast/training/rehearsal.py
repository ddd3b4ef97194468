"""A run's stages on dummy pairs, to refuse settings that cannot work before the run starts.

People label before training starts. Without a rehearsal, settings that `DPOTrainer` refuses would
be found only after the first round is labeled.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import numpy
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback

from activedpo_fast._files import reason_of
from activedpo_fast.distributed.processes import LostContactError
from activedpo_fast.errors import ActiveDPOError, UnsupportedParameterError
from activedpo_fast.gradients.token_budget import is_out_of_memory
from activedpo_fast.models.adapters import adapter_state
from activedpo_fast.pool.items import PoolItem, Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.texts import Text
from activedpo_fast.selection.result import Selection
from activedpo_fast.selector import ActiveDPOSelector
from activedpo_fast.training.generation import respond, shortest_prompts
from activedpo_fast.training.generators import rehearse_generate
from activedpo_fast.training.processes import RunProcesses
from activedpo_fast.training.trl import Reference, dpo_config, train_dpo

if TYPE_CHECKING:
    import datasets
    from trl import DPOConfig

logger = logging.getLogger(__name__)

_RESPONSES = ("Yes, it is.", "No, that is not quite right.")
_LONGEST_REASON = 500


def rehearse(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    selector: ActiveDPOSelector,
    dpo_args: DPOConfig,
    *,
    reference: Reference,
    batch_size: int,
    generation: Mapping[str, Any] | None,
    generate: Any = None,
    eval_dataset: datasets.Dataset | None = None,
    processes: RunProcesses,
) -> None:
    """Generate, select and train once on dummy pairs, with the settings of a run.

    All prompts are encoded, and two tokens are sampled after the two shortest. With dummy responses
    these two prompts form a pool, from which one pair is selected, and `batch_size` pairs, on which
    a `DPOTrainer` takes its first step. Nothing is reported, pushed to the Hub or written, except
    to a temporary folder. Afterward everything is restored bit for bit: weights, buffers, flags,
    modes, hooks and configs of the model, its device, the tokenizer, and the global random
    generators.

    Args:
        prompts: all `Prompt`s, or `PoolItem`s, that the run may offer.
        batch_size: pairs in a round.
        generation: arguments of `generate_responses`; None: nothing is generated, and `prompts` are
            the items of a pool, of which the two shortest take the place of dummies.
        generate: the loop's own source of responses, of which its method `rehearse` is called, if
            it has one, in place of sampling.
        eval_dataset: of the trainer's own evaluation, which gets two of its rows.
        processes: of the run: each generates and selects for itself, and they train together.

    Raises:
        ActiveDPOError: a stage fails. The message begins with the section of the settings at
            fault, and the setting if it is known.
    """
    started = time.perf_counter()

    def pick() -> Selection:
        if generation is None:
            pool = _shortest(selector, prompts)
        else:
            ask = processes.rank == 0
            pool = PreferencePool(
                PoolItem(prompt.id, prompt.prompt, _dummies(prompt.prompt), dict(prompt.extra))
                for prompt in _generate(model, processing_class, prompts, generation, generate, ask)
            )
        twin = copy_selector(selector)
        twin.ref_model = adapter_state(model)  # as in the first round
        return _select(twin, pool, dpo_args)

    with _unchanged(model), _quiet():
        picked = processes.check(pick)
        few = eval_dataset and eval_dataset.select(range(min(2, len(eval_dataset))))
        _train(model, processing_class, picked, dpo_args, reference, batch_size, few)
    logger.info(
        "rehearsed %sselection and a training step on %s pairs (%.1f s)",
        "" if generation is None else "generation, ",
        "given" if generation is None else "dummy",
        time.perf_counter() - started,
    )


def _generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    generation: Mapping[str, Any],
    generate: Any,
    ask: bool,
) -> list[Prompt]:
    """Encode all prompts and sample two tokens; return the two prompts with the fewest tokens.

    Args:
        ask: whether `generate` is rehearsed in this process.
    """
    length, kwargs = generation["max_completion_length"], generation["chat_template_kwargs"]
    try:
        shortest = [prompts[n] for n in shortest_prompts(model, tokenizer, prompts, length, kwargs)]
        if generate is not None:
            if ask:
                rehearse_generate(generate, shortest, kwargs)
            return shortest
        respond(
            model,
            tokenizer,
            shortest,
            max_completion_length=min(length, 2),
            temperature=generation["temperature"],
            top_p=generation["top_p"],
            chat_template_kwargs=kwargs,
            show_progress=False,
        )
    except ActiveDPOError as error:
        raise ActiveDPOError(f"generation: {error}") from error
    return shortest


def _shortest(selector: ActiveDPOSelector, items: Sequence[PoolItem]) -> PreferencePool:
    """Encode all items; return the two with the fewest tokens, those that are trained on first."""
    pool = PreferencePool(items)
    try:
        tokens = selector.tokenize(pool, show_progress=False)
    except ActiveDPOError as error:
        raise ActiveDPOError(f"prompts: {error}") from error
    longest = [
        max(len(tokens.sequences[row].input_ids) for row in range(*rows))
        for rows in pairwise(pool.response_offsets.tolist())
    ]
    skipped = set(tokens.skipped)
    order = sorted(range(len(pool)), key=lambda n: (n in skipped, longest[n]))
    return pool.subset(order[:2])


def _dummies(prompt: Text) -> tuple[Text, ...]:
    if isinstance(prompt, str):
        return tuple(f" {text}" for text in _RESPONSES)
    return tuple([{"role": "assistant", "content": text}] for text in _RESPONSES)


def _select(selector: ActiveDPOSelector, pool: PreferencePool, dpo_args: DPOConfig) -> Selection:
    """Try selection on the pairs that the trainer would not leave out."""
    try:
        skipped = selector.tokenize(pool, show_progress=False).skipped
        if len(skipped) == len(pool):
            raise ActiveDPOError(
                f"even the shortest prompt fills dpo.max_length="
                f"{dpo_args.max_length}, which leaves nothing to train on"
            )
        n = len(pool) - len(skipped)
        if selector.args.preselect is not None:  # both stages, which a small pool would not need
            selector.args, n = replace(selector.args, preselect=1), 1
        return selector.select(pool, n, show_progress=False)
    except UnsupportedParameterError as error:
        raise UnsupportedParameterError(f"adapter or lora: {error}") from error
    except ActiveDPOError as error:
        raise ActiveDPOError(f"selection: {error}") from error


def copy_selector(selector: ActiveDPOSelector) -> ActiveDPOSelector:
    """Return a selector with the same model and settings, and its own self-check state.

    The self-check's result on dummy responses says nothing about the run's own.
    """
    twin = copy.copy(selector)
    for name, value in vars(twin).items():
        if isinstance(value, (dict, list, set, WeakKeyDictionary, WeakSet)):
            setattr(twin, name, copy.copy(value))
    twin.extractor = selector.extractor.copy()
    twin.strategy = copy.deepcopy(selector.strategy)
    return twin


def _train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    picked: Selection,
    dpo_args: DPOConfig,
    reference: Reference,
    batch_size: int,
    eval_dataset: datasets.Dataset | None,
) -> None:
    # Use a round's number of pairs: the schedule and the last batch depend on it.
    picks = tuple(replace(picked[n % len(picked)], rank=n) for n in range(batch_size))
    dataset = Selection(picks, picked.strategy).to_dataset([n % 2 for n in range(batch_size)])
    with _temporary_folder() as folder:
        args = copy.copy(dpo_args)
        args.output_dir = folder
        args.push_to_hub = False
        args.report_to = []
        try:
            _check_reports(dpo_args)
            metrics = train_dpo(
                model,
                tokenizer,
                dataset,
                args,
                reference=reference,
                initial_adapter=adapter_state(model),
                callbacks=[_OneStep()],
                eval_dataset=eval_dataset,
                show_progress=False,
            )
        except LostContactError:
            raise
        except Exception as error:  # any library that the trainer calls may raise
            raise ActiveDPOError(_describe(error, dpo_args)) from error
    if metrics["steps"] == 0:
        raise ActiveDPOError(
            f"dpo: no training step is taken on the {batch_size} pairs of a round (loop.batch_size)"
            "; look at per_device_train_batch_size with dataloader_drop_last, max_steps and "
            "num_train_epochs"
        )


@contextmanager
def _temporary_folder() -> Iterator[str]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="activedpo-")
    except OSError as error:
        raise ActiveDPOError(
            f"the rehearsal needs a folder for temporary files: {reason_of(error)}: set TMPDIR to "
            "one that can be written, with room"
        ) from None
    with folder as path:
        yield path


class _OneStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def _check_reports(dpo_args: DPOConfig) -> None:
    """Raise what the trainer would if a reporting package is missing."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(dpo_args.report_to):
            callback()
    except Exception as error:
        raise ActiveDPOError(f"report_to: {error}") from error


def _describe(error: Exception, dpo_args: DPOConfig) -> str:
    """Return one line: the section, the setting if the message names it, and the reason."""
    if is_out_of_memory(error):
        return (
            "dpo: one training step on short responses runs out of memory: lower "
            "per_device_train_batch_size (and raise gradient_accumulation_steps), or switch on "
            "gradient_checkpointing"
        )
    reason = " ".join(str(error).split())
    if isinstance(error, (LookupError, AttributeError, TypeError)) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]} ..."
    if "target_modules" in reason:
        return f"lora.target_modules: {reason}"
    given = _given(dpo_args)
    # Keep the order of the message: trainers name the setting at fault before the remedy.
    words = re.findall(r"\w+", reason)
    named = next((word for word in words if word in given), None) or next(
        (
            name
            for name, value in given.items()
            if any(
                isinstance(text, str) and text in words
                for text in (value if isinstance(value, list) else [value])
            )
        ),
        None,
    )
    if named is not None:
        return f"dpo.{named}: {reason.removeprefix(f'{named}: ')}"
    return f"dpo: {reason} (given in dpo: {', '.join(given)})"


def _given(dpo_args: DPOConfig) -> dict[str, Any]:
    """Return the fields that differ from the defaults of `dpo_config`."""
    usual = dpo_config()
    return {
        field.name: value
        for field in fields(dpo_args)
        if field.name != "output_dir"
        and (value := getattr(dpo_args, field.name)) != getattr(usual, field.name, None)
    }


# -- restoring state -------------------------------------------------------------------------------


@contextmanager
def _unchanged(model: PeftModel) -> Iterator[None]:
    """Restore weights, buffers and device of the model, and the global random state."""
    parameters = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    device = next(model.parameters()).device
    with _global_state():
        try:
            yield
        finally:
            if next(model.parameters()).device != device:
                model.to(device)
            for module, before in buffers:
                module._buffers.clear()
                module._buffers.update(before)
            with torch.no_grad():
                for parameter, value in parameters:
                    parameter.copy_(value)


@contextmanager
def _global_state() -> Iterator[None]:
    """Restore the random generators, and the switches and variables `full_determinism` sets."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = range(torch.accelerator.device_count()) if accelerator else []
    variables = dict(os.environ)
    python, arrays = random.getstate(), numpy.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with torch.random.fork_rng(
        devices=devices, device_type=accelerator.type if accelerator else "cuda"
    ):
        try:
            yield
        finally:
            for name in os.environ.keys() - variables.keys():
                del os.environ[name]
            os.environ.update(variables)
            random.setstate(python)
            numpy.random.set_state(arrays)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence our warnings about dummy pairs: those that matter recur with the real ones."""
    log = logging.getLogger("activedpo_fast")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
