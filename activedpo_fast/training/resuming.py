"""Whether a run on disk may go on: with these settings, and from this adapter.

Settings may still change that nothing on disk depends on yet.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from activedpo_fast._files import read_checked_json, read_json, write_checked_json, write_json
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.fingerprints import is_untrained
from activedpo_fast.pool.files import jsonl_rows
from activedpo_fast.settings import SAMPLING
from activedpo_fast.training.run_folder import read_adapter, round_folders

logger = logging.getLogger(__name__)

_FILE = "config.json"
_FORMAT = 3  # of that file; 1 (not recorded in the file) had no model and tokenizer, 2 no checksum

# Settings whose entries come from a library: entries that only one version has do not count.
_OF_A_LIBRARY = (("dpo",), ("lora",), ("base", "config"))

# For each stage, whether a run's folder has a result of it.
_STAGES: dict[str, Callable[[Path], bool]] = {
    "started": lambda folder: (folder / "start" / "adapter").exists(),
    "generated": lambda folder: _any_has(folder, "pool.jsonl"),
    "picked": lambda folder: _any_has(folder, "picked.jsonl"),
    # By a policy other than the first one.
    "picked again": lambda folder: any(
        (later / "picked.jsonl").exists()
        for number, later in round_folders(folder).items()
        for first in _trained(folder)[:1]
        if number > first
    ),
    "labeled": lambda folder: _any_has(folder, "labels.jsonl"),
    "trained": lambda folder: len(_trained(folder)) > 0,
    "trained again": lambda folder: len(_trained(folder)) > 1,
    "evaluated": lambda folder: (folder / "start" / "record.json").exists(),
}

# The first stage that a setting affects; if several prefixes match, the longest counts. Settings
# not listed count from the start.
_ENTERS: dict[str, str | None] = {
    "model": None,  # a path; its content is compared as `base`
    "prompts": "generated",
    "prompts_per_round": "generated",
    "responses": "generated",
    **dict.fromkeys(SAMPLING, "generated"),
    "chat_template_kwargs": "generated",
    "generate": "generated",
    "rules": "picked",
    "rules.exclude": "generated",  # excluded prompts get no responses
    "strategy": "picked",
    "selector_options": "picked",
    "batch_size": "picked",
    "extra_settings.oracle": "labeled",
    "oracle": "labeled",
    "evaluate": "evaluated",
    "extra_settings.evaluate": "evaluated",
    "dpo": "trained",
    "eval_dataset": "trained",
    # In the first round that is trained on, all labels are the newest and the current policy is
    # the initial one.
    "reference": "picked again",  # strategies may need it, too
    "train_on": "trained again",
    "start_from": "trained again",
    # Settings that never affect a result.
    **dict.fromkeys(
        (
            "dpo.report_to",
            "dpo.disable_tqdm",
            "dpo.push_to_hub",
            "dpo.log_level",
            "dpo.log_level_replica",
            "dpo.logging_strategy",
            "dpo.logging_steps",
            "dpo.logging_first_step",
            "dpo.save_strategy",
            "dpo.save_steps",
            "dpo.save_total_limit",
            "dpo.dataset_num_proc",
            "dpo.dataloader_num_workers",
            "dpo.dataloader_pin_memory",
        ),
        None,
    ),
}

# Options of the selector that follow from fields of DPOConfig, which the user has set.
_FOLLOWS = {
    "selector_options.beta": ("dpo.beta",),
    "selector_options.max_length": ("dpo.max_length",),
    "selector_options.truncation_mode": ("dpo.truncation_mode",),
    "selector_options.length_normalized": ("dpo.loss_type", "dpo.loss_weights"),
}

_NO_IDS = hashlib.sha256(b"[]").hexdigest()  # "rules.exclude" if nothing is excluded

# The mask that `to_dict` shows instead of a value; runs of older versions have recorded it.
_MASKED = ("dpo.pad_token", "<PAD_TOKEN>")

Change = tuple[str, Any, Any]  # name, the value on disk, the value now


def check_settings(folder: Path, settings: dict[str, Any]) -> list[Change]:
    """Return the settings that differ from the run's in `folder` and have had no effect yet.

    Raises:
        ActiveDPOError: something in `folder` depends on a changed setting; the first is named.
    """
    path = folder / _FILE
    if not path.exists():
        if (
            any(any(path.iterdir()) for path in round_folders(folder).values())
            or (folder / "start" / "adapter").exists()
        ):
            raise ActiveDPOError(
                f"{path} is gone, which has the settings of the rounds there: put "
                "it back, or use another output_dir"
            )
        return []
    config = _read(path)
    if not isinstance(config.get("settings"), dict):
        raise ActiveDPOError(f"{path} has no settings of a run: use another output_dir")
    old = config["settings"]
    if config.get("format", 1) < _FORMAT:
        unknown = [name for name in settings if name not in old]
        settings = {name: value for name, value in settings.items() if name in old}
        logger.warning(
            "%s holds a run that an older version began, which did not record %s: "
            "these are not compared",
            folder,
            ", ".join(unknown),
        )
    changes = list(differences(*_of_both(old, settings)))
    found = first_that_matters(changes, folder)
    if "base" not in old:  # an older version recorded only the path
        found = next((change for change in changes if change[0] == "model"), found)
    if found is not None:
        raise ActiveDPOError(
            f"{folder} holds a run with other settings: "
            f"{describe(_origin(found, changes))} differs; use another "
            "output_dir, or the same settings"
        )
    for name, now in _versions().items():
        if (before := config.get("versions", {}).get(name)) != now:
            logger.warning(
                "%s was begun with %s %s, this is %s: results may differ slightly",
                folder,
                name,
                before,
                now,
            )
    return changes


def check_adapter(folder: Path, own: Mapping[str, torch.Tensor]) -> bool:
    """Refuse an adapter in memory unless it is that of the run in `folder`, or fresh like its
    first; return whether the run has begun.

    Args:
        own: `adapter_state` of the model.
    """
    start = folder / "start"
    trained = [path for path in round_folders(folder).values() if (path / "adapter").exists()]
    if not (start / "adapter").exists():
        if trained:
            raise ActiveDPOError(
                f"{start / 'adapter'} is gone, from which the rounds of {folder} go on: put it "
                "back, or use another output_dir"
            )
        return False
    for path in (start, *reversed(trained)):
        found = read_adapter(path)
        if found.keys() == own.keys() and all(
            torch.equal(found[name].to(own[name].dtype), own[name].cpu()) for name in own
        ):
            return True
        if path == start and is_untrained(found) and is_untrained(own):
            logger.info(
                "going on from the fresh adapter in %s instead of the one in memory",
                path / "adapter",
            )
            return True
    raise ActiveDPOError(
        f"{folder} holds a run with other settings: the adapter differs from {start / 'adapter'}, "
        "which the run began with; use another output_dir, or the same adapter"
    )


def write_settings(folder: Path, settings: dict[str, Any], mended: list[Change]) -> None:
    """Write the settings if the run in `folder` is new, or if some were `mended`."""
    path = folder / _FILE
    if mended:
        logger.info(
            "%s: settings changed that nothing there depends on yet: %s",
            folder,
            ", ".join(dict.fromkeys(describe(_origin(change, mended)) for change in mended)),
        )
        config = _read(path)
        if config.get("format", 1) < _FORMAT:  # settings it does not record remain unknown
            settings = {name: settings[name] for name in settings if name in config["settings"]}
        write = write_json if config.get("format", 1) < _FORMAT else write_checked_json
        write(path, {**config, "settings": settings})
    elif not path.exists():
        write_checked_json(path, {"format": _FORMAT, "settings": settings, "versions": _versions()})


def _read(path: Path) -> dict[str, Any]:
    """Return the content of `config.json`; before format 3 it has no checksum."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ActiveDPOError(f"{path} has no settings of a run: use another output_dir")
    version = config.get("format", 1)
    if type(version) is not int or version > _FORMAT:
        raise ActiveDPOError(
            f"{path} is of a run that a newer version began (format {version!r}, here {_FORMAT}): "
            "update activedpo-fast"
        )
    return read_checked_json(path) if version == _FORMAT or "checksum" in config else config


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft", "trl")}


def _of_both(old: dict[str, Any], new: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return copies of two settings; from `_OF_A_LIBRARY` sections, only the shared entries."""
    copies = json.loads(json.dumps([old, new]))
    for keys in _OF_A_LIBRARY:
        a, b = copies
        for key in keys:
            a, b = ((side or {}).get(key) for side in (a, b))
        if a is not None and b is not None:
            for name in a.keys() ^ b.keys():
                a.pop(name, None)
                b.pop(name, None)
    return copies[0], copies[1]


def differences(old: Any, new: Any, name: str = "") -> Iterator[Change]:
    """Yield every entry in which two nested dictionaries differ, by its dotted name.

    A section that is missing on one side, or of another type, is one entry.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new and (name, old) != _MASKED:
        yield name, old, new


def first_that_matters(changes: list[Change], folder: Path) -> Change | None:
    """Return the first change that something in the run's `folder` depends on, or None."""
    present = {stage for stage, is_there in _STAGES.items() if is_there(folder)}
    return next((change for change in changes if _enters(change) in present), None)


def _origin(change: Change, changes: list[Change]) -> Change:
    """Return the change that `change` follows from, or itself if there is none."""
    names = _FOLLOWS.get(change[0], ())
    return next((other for other in changes if other[0] in names), change)


def _any_has(folder: Path, name: str) -> bool:
    return any((path / name).exists() for path in round_folders(folder).values())


def _trained(folder: Path) -> list[int]:
    """Return the numbers of the trained rounds in order, without those that had no preference."""
    return [
        number
        for number, path in round_folders(folder).items()
        if (path / "adapter").exists() and _has_preference(path / "labels.jsonl")
    ]


def _has_preference(labels: Path) -> bool:
    try:
        return any(row["label"] in (0, 1) for _, row in jsonl_rows(labels))
    except (ActiveDPOError, LookupError, TypeError):
        return True  # do not claim that there is none


def describe(change: Change) -> str:
    name, old, new = change
    return f"{name} ({old!r}, now {new!r})"


def _enters(change: Change) -> str | None:
    name, old, new = change
    if name == "rules":  # all added or removed at once
        excluded = {(rules or {}).get("exclude") for rules in (old, new)}
        name = "rules.exclude" if excluded - {None, _NO_IDS} else name
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        prefix = ".".join(parts[:n])
        if prefix in _ENTERS:
            return _ENTERS[prefix]
    return "started"
