"""The folders that models, adapters and tokenizers are read from, on disk or from the hub."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

from activedpo_fast._files import FilePath, check_readable, first_line, read_json
from activedpo_fast.errors import ActiveDPOError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# Files that a tokenizer or a model is read from; notes, optimizer states and so on do not count.
_READ_SUFFIXES = frozenset(
    {".safetensors", ".gguf", ".json", ".model", ".jinja", ".txt", ".tiktoken", ".bpe", ".codes"}
)


def resolve_source(model: FilePath, gguf_file: str | None) -> Path:
    """Return the local folder that `model` is read from; a hub name is downloaded."""
    folder = Path(model)
    if folder.is_dir():
        wanted = "config.json" if gguf_file is None else gguf_file
        if not (folder / wanted).is_file():
            hint = (
                " (it is an adapter: pass it as --adapter, and its base model as --model)"
                if (folder / ADAPTER_CONFIG).is_file()
                else ""
            )
            raise ActiveDPOError(f"{folder} is not a model folder: no {wanted} in it{hint}")
        check_model_folder(folder)
        return folder
    weights = "*.safetensors" if gguf_file is None else gguf_file
    fetched = _fetched(model, weights, "model")
    check_model_folder(fetched)
    return fetched


def local_folder(name: FilePath, revision: str | None = None) -> Path:
    """Return the folder of a model or an adapter; a hub name is downloaded, at `revision`."""
    folder = Path(name)
    return folder if folder.is_dir() else _fetched(name, "*.safetensors", "model", revision)


class TokenizerSource(NamedTuple):
    """The folder that a tokenizer is read from; `whose` is "model", "adapter" or "given"."""

    whose: str
    folder: Path


def tokenizer_source(
    model: FilePath,
    adapter: FilePath | None = None,
    tokenizer: FilePath | None = None,
    gguf_file: str | None = None,
) -> TokenizerSource:
    """Return where `load_policy` reads the tokenizer from, with these arguments.

    Raises:
        ActiveDPOError: `tokenizer` is not a folder with a tokenizer; the adapter's folder has an
            incomplete one.
    """
    if tokenizer is not None:
        given = Path(tokenizer)
        if not given.is_dir():
            return TokenizerSource("given", _fetched(tokenizer, None, "tokenizer"))
        if not _has_tokenizer(given):
            raise ActiveDPOError(
                f"tokenizer: {given} has no tokenizer.json or tokenizer_config.json in it"
            )
        return TokenizerSource("given", given)
    if adapter is not None:
        folder = Path(adapter)
        if _has_tokenizer(folder):
            return TokenizerSource("adapter", folder)
        lone = next(
            (
                name
                for name in ("chat_template.jinja", "chat_template.json")
                if (folder / name).is_file()
            ),
            None,
        )
        if lone is not None:
            raise ActiveDPOError(
                f"adapter {folder} has a {lone} but no tokenizer: give the "
                "tokenizer that it was trained with (--tokenizer DIR)"
            )
    return TokenizerSource("model", resolve_source(model, gguf_file))


def check_adapter_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ActiveDPOError(f"{folder}: no such adapter folder")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ActiveDPOError(f"{folder} is not an adapter folder: no {name} in it")
    check_readable(files_read(folder))
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise ActiveDPOError(f"{folder / ADAPTER_CONFIG}: not a JSON object")
    if config.get("megatron_config"):
        raise ActiveDPOError(
            f"adapter {folder} sets 'megatron_config', with which PEFT imports a module that the "
            f"adapter names: remove it from {ADAPTER_CONFIG}"
        )


def check_model_folder(folder: Path) -> None:
    """Raise `ActiveDPOError` if loading the model would read more than this folder's weights.

    Raises:
        ActiveDPOError: an index that names other files than safetensors files of the folder; the
            configuration of an adapter, for which transformers would load another base model.
    """
    check_readable(files_read(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        raise ActiveDPOError(
            f"{folder} is a model folder and has an {ADAPTER_CONFIG}: move the adapter into a "
            "folder of its own"
        )
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return
    found = read_json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict):
        raise ActiveDPOError(f"{index}: no 'weight_map' of names to files")
    for name in names.values():
        if not (isinstance(name, str) and name.endswith(".safetensors") and "/" not in name):
            raise ActiveDPOError(
                f"{index} names {short(name)}, which is not a safetensors file of the folder: only "
                "those are read"
            )


def files_read(folder: Path) -> list[Path]:
    """Return the files that a model or tokenizer in `folder` is read from, by name."""
    templates = folder / "additional_chat_templates"
    return [
        path
        for path in (*sorted(folder.iterdir()), *sorted(templates.glob("*.jinja")))
        if path.suffix in _READ_SUFFIXES and path.is_file()
    ]


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _fetched(source: FilePath, weights: str | None, what: str, revision: str | None = None) -> Path:
    """Return a snapshot of `source` if it is not a local folder and can be a hub name."""
    folder, name = Path(source), str(source)
    # A hub name is "name" or "owner/name"; everything else is a path.
    if folder.exists() or folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ActiveDPOError(f"{name}: no such {what} folder")
    return _hub_snapshot(name, weights, what, revision)


def _hub_snapshot(name: str, weights: str | None, what: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = [f"*{suffix}" for suffix in _READ_SUFFIXES - {".safetensors", ".gguf"}]
    if weights is not None:
        wanted.append(weights)
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns="*/*")
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ActiveDPOError(
            f"{name}: no such {what} folder, and the hub does not give a {what} "
            f"of this name: {first_line(error)}"
        ) from error
