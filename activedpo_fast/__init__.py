"""Pick the preference pairs to label next for DPO, given the model in training.

    selector = ActiveDPOSelector(model, processing_class=tokenizer)
    picked = selector.select(pool, 50)
    train_dataset = picked.to_dataset(labels)      # for trl.DPOTrainer

See README.md for the whole loop and docs/method.md for the mathematics.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("activedpo-fast")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from activedpo_fast._limits import raised_limits
    from activedpo_fast.errors import ActiveDPOError, UnsupportedParameterError
    from activedpo_fast.gradients.extractor import FeatureExtractor
    from activedpo_fast.gradients.sketch import Sketch
    from activedpo_fast.labels.reading import by_preference, read_labels, read_pending
    from activedpo_fast.pool.items import PoolItem, Prompt
    from activedpo_fast.pool.pool import PreferencePool
    from activedpo_fast.selection.information.matrix import InformationMatrix
    from activedpo_fast.selection.picks_jsonl import Pick
    from activedpo_fast.selection.result import Selection
    from activedpo_fast.selection.rules import PickRules
    from activedpo_fast.selection.strategies import Strategy, make_strategy
    from activedpo_fast.selector import ActiveDPOSelector
    from activedpo_fast.settings import LoopConfig, SelectorConfig
    from activedpo_fast.store.store import FeatureStore
    from activedpo_fast.training.generation import generate_responses
    from activedpo_fast.training.loop import ActiveDPOLoop
    from activedpo_fast.training.run_folder import RoundRecord
    from activedpo_fast.training.trl import selector_settings

# torch and transformers take seconds to import, so modules are loaded on first access.
_HOME = {
    "ActiveDPOError": "errors",
    "ActiveDPOLoop": "training.loop",
    "ActiveDPOSelector": "selector",
    "FeatureExtractor": "gradients.extractor",
    "FeatureStore": "store.store",
    "InformationMatrix": "selection.information.matrix",
    "LoopConfig": "settings",
    "Pick": "selection.picks_jsonl",
    "PickRules": "selection.rules",
    "PoolItem": "pool.items",
    "PreferencePool": "pool.pool",
    "Prompt": "pool.items",
    "RoundRecord": "training.run_folder",
    "Selection": "selection.result",
    "SelectorConfig": "settings",
    "Sketch": "gradients.sketch",
    "Strategy": "selection.strategies",
    "UnsupportedParameterError": "errors",
    "by_preference": "labels.reading",
    "generate_responses": "training.generation",
    "make_strategy": "selection.strategies",
    "raised_limits": "_limits",
    "read_labels": "labels.reading",
    "read_pending": "labels.reading",
    "selector_settings": "training.trl",
}

__all__ = [
    "ActiveDPOError",
    "ActiveDPOLoop",
    "ActiveDPOSelector",
    "FeatureExtractor",
    "FeatureStore",
    "InformationMatrix",
    "LoopConfig",
    "Pick",
    "PickRules",
    "PoolItem",
    "PreferencePool",
    "Prompt",
    "RoundRecord",
    "Selection",
    "SelectorConfig",
    "Sketch",
    "Strategy",
    "UnsupportedParameterError",
    "__version__",
    "by_preference",
    "generate_responses",
    "make_strategy",
    "raised_limits",
    "read_labels",
    "read_pending",
    "selector_settings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
