"""Which settings of a run on disk may still change: those that nothing on disk depends on yet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Where the first result of each stage is, in a run's folder.
_STAGES = {
    "started": "start/adapter",
    "generated": "round-*/pool.jsonl",
    "picked": "round-*/picked.jsonl",
    "picked again": "round-001/picked.jsonl",
    "trained": "round-*/adapter",
    "trained again": "round-001/adapter",
}

# The first stage that a setting enters; of several prefixes that fit, the longest counts. Settings
# that are not here count from the start.
_ENTERS: dict[str, str | None] = {
    "prompts": "generated",
    "prompts_per_round": "generated",
    "generation": "generated",
    "chat_template_kwargs": "generated",
    "rules": "picked",
    "rules.exclude": "generated",  # prompts to exclude get no responses
    "strategy": "picked",
    "selector_options": "picked",
    "batch_size": "picked",
    "dpo": "trained",
    # In the first round, all labels are the newest and the current policy is the initial one.
    "reference": "picked again",  # strategies may ask for it, too
    "train_on": "trained again",
    "start_from": "trained again",
    # What never enters a result.
    **dict.fromkeys(("dpo.report_to", "dpo.disable_tqdm", "dpo.push_to_hub", "dpo.log_level",
                     "dpo.log_level_replica", "dpo.logging_strategy", "dpo.logging_steps",
                     "dpo.logging_first_step", "dpo.save_strategy", "dpo.save_steps",
                     "dpo.save_total_limit", "dpo.dataset_num_proc", "dpo.dataloader_num_workers",
                     "dpo.dataloader_pin_memory"), None),
}

_NO_IDS = hashlib.sha256(b"[]").hexdigest()  # "rules.exclude" where nothing is excluded

# What `to_dict` shows instead of a value, and runs of older versions have written down.
_MASKED = ("dpo.pad_token", "<PAD_TOKEN>")

Change = tuple[str, Any, Any]  # name, the value on disk, the value now


def differences(old: Any, new: Any, name: str = "") -> Iterator[Change]:
    """Every entry in which two nested dictionaries differ, by its dotted name.

    A section that is missing or of another kind on one side is one entry.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new and (name, old) != _MASKED:
        yield name, old, new


def first_that_matters(changes: list[Change], folder: Path) -> Change | None:
    """The first change of a setting that something in the run's `folder` depends on, or None."""
    present = {stage for stage, pattern in _STAGES.items() if any(folder.glob(pattern))}
    return next((change for change in changes if _enters(change) in present), None)


def describe(change: Change) -> str:
    name, old, new = change
    return f"{name} ({old!r}, now {new!r})"


def _enters(change: Change) -> str | None:
    name, old, new = change
    if name == "rules":  # all came or went at once
        excluded = {(rules or {}).get("exclude") for rules in (old, new)}
        name = "rules.exclude" if excluded - {None, _NO_IDS} else name
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        prefix = ".".join(parts[:n])
        if prefix in _ENTERS:
            return _ENTERS[prefix]
    return "started"
