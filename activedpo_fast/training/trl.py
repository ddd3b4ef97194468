"""One round of DPO with TRL's `DPOTrainer`, which changes only the adapter's weights."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft import PeftModel, PeftType
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback

from activedpo_fast._modes import in_own_modes
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.adapters import adapter_state, load_adapter_state, trained_outside
from activedpo_fast.models.encoder_decoder import refuse_encoder_decoder
from activedpo_fast.pool.tokenizers import leaves_tokenizer
from activedpo_fast.progress import progress_bar
from activedpo_fast.training.data_parallel import (
    in_contact,
    mean_over_processes,
    with_shared_batches,
)
from activedpo_fast.training.options import check_training_options, trains_mean_logps
from activedpo_fast.training.tracking import track_as_one_run

if TYPE_CHECKING:
    import datasets
    from trl import DPOConfig

Reference = Literal["initial", "round"]

NOT_TRAINED = "which trl.DPOTrainer does not train"  # of an encoder-decoder model

_ADAPTER = "default"  # TRL 1.16 copies the adapter of this name ...
_REFERENCE = "ref"  # ... to one of this name, which is π_ref


def dpo_config(**overrides: Any) -> DPOConfig:
    """Return a `trl.DPOConfig` for short rounds: the trainer saves, reports and prints nothing.

    TRL's defaults apply to everything else, except: no gradient checkpointing (rounds are on small
    LoRA batches; turn it on for large models), and `use_cpu` with `bf16=False` if there is no
    accelerator. Everything can be overridden by name.
    """
    _, config_class = _trl()
    settings: dict[str, Any] = {
        "output_dir": "trainer_output",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    if not torch.accelerator.is_available():
        settings |= {"use_cpu": True, "bf16": False}
    settings |= overrides
    try:
        with warnings.catch_warnings():
            # TRL's own default warns, too: transformers has renamed the option.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            config: DPOConfig = config_class(**settings)
            return config
    except TypeError as error:
        raise ActiveDPOError(f"DPOConfig: {error}") from error


def selector_settings(args: DPOConfig) -> dict[str, Any]:
    """Return options for `ActiveDPOSelector` that match what the trainer trains.

    They give the same tokens and β, and `length_normalized` for losses of mean log-probs. Every
    field of DPOConfig is listed in `activedpo_fast.training.options` and docs/trl.md.

    Raises:
        ActiveDPOError: selection cannot follow a field (`ld_alpha`, another f-divergence,
            `sync_ref_model`, loss types that disagree); the message names it and its value.

    Examples:
        >>> from trl import DPOConfig
        >>> from activedpo_fast import ActiveDPOSelector, selector_settings
        >>> args = DPOConfig(output_dir="trainer", beta=0.2, max_length=512, use_cpu=True)
        >>> selector_settings(args)
        {'beta': 0.2, 'max_length': 512, 'truncation_mode': 'keep_start'}
        >>> selector = ActiveDPOSelector(model, tokenizer, **selector_settings(args))
    """
    check_training_options(args)
    return {
        "beta": args.beta,
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
        # Only if true: runs with other losses do not record it.
        **({"length_normalized": True} if trains_mean_logps(args) else {}),
    }


@in_own_modes
@leaves_tokenizer(1)
def train_dpo(
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    args: DPOConfig,
    *,
    reference: Reference = "initial",
    initial_adapter: Mapping[str, torch.Tensor] | None = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    eval_dataset: datasets.Dataset | None = None,
    show_progress: bool | None = None,
    steps_before: int | None = None,
) -> dict[str, float]:
    """Train the adapter "default" of `model` in place with `trl.DPOTrainer`.

    Afterward, also after an exception, the model is restored (adapters, flags, modes, hooks,
    dropout, configs, buffers, `forward`), `.grad` is None everywhere, and only the adapter's
    weights differ, in their original dtype. (TRL itself trains the adapter of a 4- or 8-bit model
    in bfloat16.) The model stays on the trainer's device. The trainer seeds the global random
    generators with `args.seed`; they are not restored.

    Under torchrun or `accelerate launch`, every process calls this with its own copy of the model.
    A step is then on as many pairs as in one process, if these divide (see
    `activedpo_fast.training.data_parallel`), and its gradients are the same up to rounding. The
    last step of an epoch that has too few pairs for all processes repeats some of its first.

    Args:
        dataset: prompt, chosen, rejected, as returned by `Selection.to_dataset`.
        reference: π_ref. "initial": the model with `initial_adapter`; "round": the model as it is
            at the call.
        initial_adapter: `adapter_state(model)` from before the first round; for "initial".
        callbacks: for the trainer.
        eval_dataset: as `dataset`, for the trainer's own evaluation (`args.eval_strategy`).
        show_progress: a bar over the optimizer's steps; None shows it on a terminal only.
        steps_before: optimizer's steps of the rounds before this one: what `args.report_to` reports
            goes on from there, in the same run (see `activedpo_fast.training.tracking`). None: the
            round is a run of its own.

    Returns:
        "loss" (mean over the training), "steps", "pairs" trained on (without those that the trainer
        leaves out because their prompt fills max_length), "seconds"; "eval_loss", "eval_accuracy"
        and "eval_margin" of the trainer's last evaluation, if there was one.

    Raises:
        ActiveDPOError: TRL is missing; not a PEFT model, or one that also trains weights outside
            its adapter; the active adapter is not "default"; an adapter is called "ref"; no pair to
            train on; incompatible options; another process is gone.
    """
    trainer_class, _ = _trl()
    check_callbacks(callbacks)
    _check(model, dataset, args, reference, initial_adapter)
    args = with_shared_batches(args)
    started = time.perf_counter()
    with in_contact(args), _restored(model, processing_class), _quiet_datasets():
        with _plain_initialization(model):
            trainer = trainer_class(
                model=model,
                args=args,
                train_dataset=dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=[*(callbacks or ()), _Bar(show_progress)],
            )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if steps_before is not None:
            track_as_one_run(trainer, args, steps_before)
        pairs = len(cast(Any, trainer.train_dataset))
        if pairs == 0:
            raise ActiveDPOError(
                f"no pair to train on: every prompt fills max_length={args.max_length}"
            )
        if args.dataloader_drop_last and pairs < args.train_batch_size * args.world_size:
            raise ActiveDPOError(
                f"dataloader_drop_last=True leaves out the only batch, of {pairs} "
                "pairs: per_device_train_batch_size is "
                f"{args.per_device_train_batch_size * args.world_size}"
            )
        _set_reference(model, args, initial_adapter if reference == "initial" else None)
        output = trainer.train()
        loss = mean_over_processes(trainer, output.training_loss)
    return {
        "loss": loss,
        "steps": output.global_step,
        "pairs": pairs,
        "seconds": time.perf_counter() - started,
        **_last_evaluation(trainer.state.log_history),
    }


_EVALUATED = {
    "eval_loss": "eval_loss",
    "eval_rewards/accuracies": "eval_accuracy",
    "eval_rewards/margins": "eval_margin",
}


def _last_evaluation(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what the trainer logged about its last evaluation, by our names."""
    last = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    return {own: float(last[name]) for name, own in _EVALUATED.items() if name in last}


def check_finite(model: PeftModel, name: str) -> None:
    """Refuse an adapter with NaN or infinite weights, trained in the round `name`."""
    for weight, tensor in adapter_state(model).items():
        if not tensor.isfinite().all():
            raise ActiveDPOError(
                f"{name}: training has diverged, {weight!r} is not finite: nothing of it is kept; "
                "use a smaller learning_rate, or a smaller max_grad_norm"
            )


def check_eval_dataset(given: Any) -> None:
    """Refuse what is no data set of pairs for the trainer's own evaluation."""
    if given is None:
        return
    columns = getattr(given, "column_names", None)
    if not isinstance(columns, list):
        raise ActiveDPOError(
            f"eval_dataset: expected a datasets.Dataset, got {type(given).__name__}"
        )
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in columns]
    if missing or not len(given):
        raise ActiveDPOError(
            f"eval_dataset: it has no column {missing[0]!r}"
            if missing
            else "eval_dataset: it has no rows"
        )


def check_callbacks(callbacks: Any) -> None:
    """Refuse what is no list of a trainer's callbacks; `Trainer` takes their classes, too."""
    if callbacks is None:
        return
    for entry in callbacks if isinstance(callbacks, Sequence) else [callbacks]:
        kind = entry if isinstance(entry, type) else type(entry)
        if entry is callbacks or not issubclass(kind, TrainerCallback):
            raise ActiveDPOError(
                f"callbacks: expected a list of transformers.TrainerCallback, got {kind.__name__}"
            )


def _trl() -> tuple[Any, Any]:
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise ActiveDPOError(
            f"training needs TRL: pip install activedpo-fast[trl] ({error})"
        ) from error
    return DPOTrainer, DPOConfig


def _check(
    model: Any,
    dataset: datasets.Dataset,
    args: DPOConfig,
    reference: str,
    initial_adapter: Mapping[str, torch.Tensor] | None,
) -> None:
    if not isinstance(model, PeftModel):
        raise ActiveDPOError(f"model: expected a PEFT model, got {type(model).__name__}")
    refuse_encoder_decoder(model, NOT_TRAINED)
    if model.active_adapters != [_ADAPTER]:
        raise ActiveDPOError(
            f"the active adapter is {', '.join(model.active_adapters) or 'none'}; "
            f"TRL trains the one called {_ADAPTER!r}, alone"
        )
    if model.peft_config[_ADAPTER].peft_type == PeftType.ADALORA:
        raise ActiveDPOError(
            "PEFT's AdaLoRA has one adapter only, and the reference is another one; train LoRA"
        )
    for name in trained_outside(model, biases=True):
        raise ActiveDPOError(
            f"{name} is trained besides the adapter, but rounds keep and restore the adapter "
            "alone, and the reference would change with it: freeze it (requires_grad_(False)), or "
            "have the adapter train it (modules_to_save)"
        )
    if _REFERENCE in model.peft_config:
        raise ActiveDPOError(
            f"the model has an adapter called {_REFERENCE!r}, the name that TRL "
            "gives to the reference; delete or rename it"
        )
    if reference not in ("initial", "round"):
        raise ActiveDPOError(f"reference: {reference!r} is neither 'initial' nor 'round'")
    if reference == "initial" and initial_adapter is None:
        raise ActiveDPOError(
            "reference='initial' needs initial_adapter=adapter_state(model), "
            "taken before the first round"
        )
    if reference == "initial" and args.precompute_ref_log_probs:
        # TRL computes them when it creates the trainer, from the policy at that point.
        raise ActiveDPOError(
            "precompute_ref_log_probs=True does not go with reference='initial'"
            ": set it to False, or reference to 'round'"
        )
    if len(dataset) == 0:
        raise ActiveDPOError("no labeled pair to train on")


@contextmanager
def _plain_initialization(model: PeftModel) -> Iterator[None]:
    """Use LoRA's plain initialization for "ref", which gets a copy of the weights anyway.

    Initializations such as PiSSA and OLoRA subtract the initial adapter from the base model's
    weights, and "ref" has the configuration of "default".
    """
    config: Any = model.peft_config[_ADAPTER]
    given = getattr(config, "init_lora_weights", True)
    try:
        if given is not True:
            config.init_lora_weights = True
        yield
    finally:
        if given is not True:
            config.init_lora_weights = given


def _set_reference(
    model: PeftModel, args: DPOConfig, weights: Mapping[str, torch.Tensor] | None
) -> None:
    """Give the trainer's adapter "ref" these weights, or the adapter's current ones.

    TRL 1.16 copies parameters with ".default." in their names, which leaves out those of IA³, LoHa,
    VeRA and of LoRA on embeddings.
    """
    wanted = adapter_state(model) if weights is None else weights
    copied = adapter_state(model, adapter_name=_REFERENCE)
    load_adapter_state(model, wanted, adapter_name=_REFERENCE)
    if args.precompute_ref_log_probs and not all(
        torch.equal(copied[name], weight.to(copied[name].device)) for name, weight in wanted.items()
    ):
        raise ActiveDPOError(
            "precompute_ref_log_probs=True does not go with this adapter, which "
            "TRL copies in part only; leave it out"
        )


@contextmanager
def _restored(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Undo what the trainer does to the model's modules, flags, adapters and configs."""
    modules = [(module, _attributes(module)) for module in model.modules()]
    # Rotary embeddings replace their frequencies when a sequence is longer than any before.
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    flags = [
        (parameter, parameter.requires_grad, parameter.dtype) for parameter in model.parameters()
    ]
    base = model.get_base_model()
    configs = {
        id(c): (c, dict(vars(c)))
        for c in (
            base.config,
            cast(Any, base.config).get_text_config(),
            getattr(base, "generation_config", None),
        )
        if c is not None
    }
    pad_token = tokenizer.pad_token
    try:
        yield
    finally:
        if _REFERENCE in model.peft_config:
            model.delete_adapter(_REFERENCE)
        for module, before in modules:
            _set_attributes(module, before)
        for module, before in buffers:
            _set_buffers(module, before)
        for parameter, flag, dtype in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
            if flag and parameter.dtype != dtype:
                # TRL trains the adapter of a 4- or 8-bit model in bfloat16.
                parameter.data = parameter.data.to(dtype)
        for config, values in configs.values():
            vars(config).clear()
            vars(config).update(values)
        if tokenizer.pad_token != pad_token:
            tokenizer.pad_token = pad_token


# Kept by reference: they are changed in place, and deleting the adapter "ref" removes its entries.
_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    """Return the module's own attributes; hook dictionaries, which may grow, are copied."""
    return {
        name: value.copy() if "_hooks" in name and isinstance(value, (dict, list)) else value
        for name, value in vars(module).items()
        if name not in _REGISTRIES
    }


def _set_attributes(module: torch.nn.Module, before: Mapping[str, Any]) -> None:
    own = vars(module)
    for name in own.keys() - before.keys() - set(_REGISTRIES):
        del own[name]
    for name, value in before.items():
        if "_hooks" in name and isinstance(value, dict):
            # Keep the same dictionary: hook handles refer to it.
            own[name].clear()
            own[name].update(value)
        else:
            own[name] = value


def _set_buffers(module: torch.nn.Module, before: Mapping[str, torch.Tensor | None]) -> None:
    """Restore the buffers of `before`, on the devices that the trainer has moved them to."""
    for name, buffer in before.items():
        now = module._buffers.get(name)
        if buffer is not None and now is not None:
            buffer = buffer.to(now.device)
        module._buffers[name] = buffer


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


class _Bar(TrainerCallback):
    """A bar over the steps, with the last logged loss."""

    def __init__(self, show_progress: bool | None) -> None:
        self._show_progress = show_progress
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = progress_bar(
                self._show_progress, total=state.max_steps, desc="train", unit="step"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.4f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
