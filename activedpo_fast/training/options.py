"""Every field of `trl.DPOConfig` (TRL 1.16): does it change log π, the gradients or the selection?

`DPO_FIELDS` has TRL's own fields, `INHERITED` those of transformers' `TrainingArguments` in groups.
A test checks both against the installed TRL, and docs/trl.md against both. TRL is not needed here.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from activedpo_fast.errors import ActiveDPOError

Status = Literal["used", "irrelevant", "refused"]


class Field(NamedTuple):
    """One field; status: "used", "irrelevant", or "refused" for the values named in `why`."""

    status: Status
    why: str


class Group(NamedTuple):
    """Fields that are treated the same, for one reason."""

    names: tuple[str, ...]
    status: Status
    why: str


# Which log π(y|x) each loss compares with π_ref, from TRL's `_compute_loss`.
_SUMS = frozenset(
    {
        "sigmoid",
        "hinge",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
    }
)
_MEANS = frozenset({"ipo", "sigmoid_norm"})
_NO_REWARD = frozenset({"sft"})

LOSS_TYPES = _SUMS | _MEANS | _NO_REWARD

DPO_FIELDS: dict[str, Field] = {
    "beta": Field("used", "β of the implicit reward; τ of `ipo`"),
    "max_length": Field("used", "truncation; a prompt that fills it is left out; below 2 refused"),
    "truncation_mode": Field("used", "which end is truncated"),
    "loss_type": Field(
        "used",
        "`ipo` and `sigmoid_norm` train mean log-probs: `length_normalized`; the others "
        "sums. `sft` adds a term without a preference, and is refused alone; a mixture of means "
        "and sums is refused",
    ),
    "loss_weights": Field("used", "a loss type of weight 0 does not count"),
    "ld_alpha": Field(
        "refused",
        "unless `None` or `1.0`: log π of a response would depend on the length of the "
        "one that it is paired with",
    ),
    "f_divergence_type": Field(
        "refused",
        "unless `reverse_kl`: the reward is no multiple of log π/π_ref, so that its "
        "gradient needs π_ref",
    ),
    "f_alpha_divergence_coef": Field(
        "irrelevant",
        "read with `alpha_divergence` alone, which is refused unless this is 1: that "
        "is `reverse_kl`",
    ),
    "sync_ref_model": Field(
        "refused",
        "π_ref would change while the model is trained; TRL has it for full fine-tuning only",
    ),
    "ref_model_mixup_alpha": Field("irrelevant", "read with `sync_ref_model` alone"),
    "ref_model_sync_steps": Field("irrelevant", "read with `sync_ref_model` alone"),
    "label_smoothing": Field(
        "irrelevant", "the loss as a function of the reward difference, which stays as it is"
    ),
    "discopop_tau": Field(
        "irrelevant", "the loss as a function of the reward difference, which stays as it is"
    ),
    "use_weighting": Field(
        "irrelevant", "weighs pairs in the loss by a number that no gradient flows through"
    ),
    "router_aux_loss_coef": Field("irrelevant", "a term of the loss for the routers of experts"),
    "disable_dropout": Field(
        "irrelevant", "features are those of the model without dropout, in training or not"
    ),
    "precompute_ref_log_probs": Field(
        "irrelevant",
        "when π_ref is computed; a loop refuses it with `reference: initial`, as TRL "
        "computes it before that is there",
    ),
    "precompute_ref_batch_size": Field("irrelevant", "when π_ref is computed"),
    "padding_free": Field("irrelevant", "TRL 1.16 warns and pads all the same"),
    "pad_to_multiple_of": Field("irrelevant", "padding is on the right, and masked"),
    "pad_token": Field(
        "irrelevant", "padding is masked, and the token does not change how texts are split"
    ),
    "dataset_num_proc": Field("irrelevant", "how fast the data set is tokenized"),
    "activation_offloading": Field("irrelevant", "where activations are kept"),
    "model_init_kwargs": Field(
        "irrelevant", "read for a model that `DPOTrainer` itself loads; ours is loaded before"
    ),
    "trust_remote_code": Field(
        "irrelevant",
        "read for a model that `DPOTrainer` itself loads; ours is loaded before, and "
        "runs no code of a checkpoint",
    ),
}

INHERITED: tuple[Group, ...] = (
    Group(
        (
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "auto_find_batch_size",
            "learning_rate",
            "lr_scheduler_type",
            "lr_scheduler_kwargs",
            "warmup_steps",
            "optim",
            "optim_args",
            "optim_target_modules",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "max_grad_norm",
            "average_tokens_across_devices",
        ),
        "irrelevant",
        "how weights move; features are taken at the weights that came of it",
    ),
    Group(
        (
            "seed",
            "data_seed",
            "full_determinism",
            "train_sampling_strategy",
            "length_column_name",
            "dataloader_drop_last",
            "ignore_data_skip",
        ),
        "irrelevant",
        "the order of the pairs, and what is random in training",
    ),
    Group(
        (
            "bf16",
            "fp16",
            "tf32",
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
            "use_liger_kernel",
            "liger_kernel_config",
        ),
        "irrelevant",
        "rounding in training; features are computed in the model's dtype, or with "
        "`bf16=True` of the selector as with `bf16`",
    ),
    Group(
        (
            "gradient_checkpointing",
            "gradient_checkpointing_kwargs",
            "activation_checkpointing",
            "activation_checkpointing_kwargs",
            "use_cache",
            "torch_empty_cache_steps",
        ),
        "irrelevant",
        "memory against time",
    ),
    Group(
        ("neftune_noise_alpha",),
        "irrelevant",
        "noise in training only; features are those of the model without it",
    ),
    Group(
        ("label_smoothing_factor", "label_names"),
        "irrelevant",
        "of the loss of `Trainer`, which `DPOTrainer` replaces",
    ),
    Group(("remove_unused_columns",), "irrelevant", "the collator reads no other columns"),
    Group(
        (
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
        "irrelevant",
        "how batches are loaded",
    ),
    Group(
        (
            "use_cpu",
            "local_rank",
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_backend",
            "ddp_timeout",
            "accelerator_config",
        ),
        "irrelevant",
        "where training runs",
    ),
    Group(
        ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
        "irrelevant",
        "where training runs; a loop refuses them, as they leave each process parts of the model",
    ),
    Group(
        ("do_train", "do_eval", "do_predict", "resume_from_checkpoint"),
        "irrelevant",
        "read by training scripts; the trainer does not look at them",
    ),
    Group(
        (
            "eval_strategy",
            "eval_steps",
            "eval_delay",
            "eval_on_start",
            "per_device_eval_batch_size",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "batch_eval_metrics",
            "include_for_metrics",
            "prediction_loss_only",
            "bf16_full_eval",
            "fp16_full_eval",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
        ),
        "irrelevant",
        "evaluation by the trainer",
    ),
    Group(
        (
            "output_dir",
            "restore_callback_states_from_checkpoint",
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "save_only_model",
            "save_on_each_node",
            "enable_jit_checkpoint",
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        "irrelevant",
        "what is saved, and where",
    ),
    Group(
        (
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "logging_nan_inf_filter",
            "log_level",
            "log_level_replica",
            "log_on_each_node",
            "include_num_input_tokens_seen",
            "disable_tqdm",
            "report_to",
            "run_name",
            "project",
            "trackio_space_id",
            "trackio_bucket_id",
            "trackio_static_space_id",
            "skip_memory_metrics",
            "debug",
        ),
        "irrelevant",
        "what is reported",
    ),
)


def check_training_options(args: Any) -> None:
    """Raise `ActiveDPOError` if selection cannot follow what a `trl.DPOConfig` trains.

    The message names the first such field and its value.
    """
    if not hasattr(args, "f_divergence_type"):  # TRL is slow to import, and need not be there
        raise ActiveDPOError(f"expected a trl.DPOConfig, got {type(args).__name__}")
    if args.ld_alpha not in (None, 1.0):
        raise ActiveDPOError(
            f"DPOConfig: ld_alpha={args.ld_alpha} gives a response another log π in every pair, by "
            "the length of the other response; selection needs one for each (leave it out)"
        )
    kind = args.f_divergence_type
    # TRL's own threshold for computing reverse_kl
    limit = kind == "alpha_divergence" and abs(args.f_alpha_divergence_coef - 1.0) < 1e-6
    if kind != "reverse_kl" and not limit:
        raise ActiveDPOError(
            f"DPOConfig: f_divergence_type={kind!r} has another implicit reward than "
            "β log(π/π_ref), whose gradient selection takes; only 'reverse_kl' is supported"
        )
    if args.sync_ref_model:
        raise ActiveDPOError(
            "DPOConfig: sync_ref_model=True changes the reference while the model is trained, so "
            "that a selection has none to compare with, and DPOTrainer refuses it for PEFT models "
            "(leave it out)"
        )
    if args.max_length is not None and not isinstance(args.max_length, int):
        raise ActiveDPOError(f"DPOConfig: max_length={args.max_length!r} is not an integer")
    if args.max_length is not None and args.max_length < 2:
        raise ActiveDPOError(
            f"DPOConfig: max_length={args.max_length} leaves no token to score, 2 is the least"
        )
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise ActiveDPOError(
            f"DPOConfig: truncation_mode={args.truncation_mode!r} is neither "
            "'keep_start' nor 'keep_end'"
        )
    trains_mean_logps(args)


def trains_mean_logps(args: Any) -> bool:
    """Return whether the loss of a `trl.DPOConfig` uses mean log-probs of a response's tokens.

    Raises:
        ActiveDPOError: an unknown loss type, none with an implicit reward, or several with
            different implicit rewards.
    """
    given = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    unknown = [name for name in given if name not in LOSS_TYPES]
    if unknown:
        raise ActiveDPOError(
            f"DPOConfig: loss_type {unknown[0]!r} is not known; known: "
            f"{', '.join(sorted(LOSS_TYPES))}"
        )
    weights = args.loss_weights or [1.0] * len(given)
    counted = [name for name, weight in zip(given, weights, strict=True) if weight != 0]
    means = [name for name in counted if name in _MEANS]
    sums = [name for name in counted if name in _SUMS]
    if means and sums:
        raise ActiveDPOError(
            f"DPOConfig: loss_type {means[0]!r} trains mean log-probs and {sums[0]!r} sums of "
            "them: there is no one implicit reward to select by; keep one of them, or give the "
            "other the weight 0"
        )
    if not (means or sums):
        raise ActiveDPOError(
            f"DPOConfig: loss_type {', '.join(map(repr, given)) or 'is empty'} "
            "learns nothing from a preference: there is no implicit reward to "
            "select by"
        )
    return bool(means)
