"""Which preference pairs to label next, for the model that is being trained now.

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
    from activedpo_fast.data import PoolItem, PreferencePool, Prompt
    from activedpo_fast.errors import ActiveDPOError, UnsupportedParameterError
    from activedpo_fast.features.extractor import FeatureExtractor
    from activedpo_fast.features.sketch import Sketch
    from activedpo_fast.features.store import FeatureStore
    from activedpo_fast.generation import generate_responses
    from activedpo_fast.loop import ActiveDPOLoop, RoundRecord
    from activedpo_fast.selection.information import InformationMatrix
    from activedpo_fast.selection.result import Pick, Selection, by_preference, read_labels
    from activedpo_fast.selection.rules import PickRules
    from activedpo_fast.selection.strategies import Strategy, make_strategy
    from activedpo_fast.selector import ActiveDPOSelector

# torch and transformers take seconds to import: a name's module is loaded when it is asked for.
_HOME = {
    "ActiveDPOError": "errors",
    "ActiveDPOLoop": "loop",
    "ActiveDPOSelector": "selector",
    "FeatureExtractor": "features.extractor",
    "FeatureStore": "features.store",
    "InformationMatrix": "selection.information",
    "Pick": "selection.result",
    "PickRules": "selection.rules",
    "PoolItem": "data",
    "PreferencePool": "data",
    "Prompt": "data",
    "RoundRecord": "loop",
    "Selection": "selection.result",
    "Sketch": "features.sketch",
    "Strategy": "selection.strategies",
    "UnsupportedParameterError": "errors",
    "by_preference": "selection.result",
    "generate_responses": "generation",
    "make_strategy": "selection.strategies",
    "read_labels": "selection.result",
}

__all__ = [
    "ActiveDPOError",
    "ActiveDPOLoop",
    "ActiveDPOSelector",
    "FeatureExtractor",
    "FeatureStore",
    "InformationMatrix",
    "Pick",
    "PickRules",
    "PoolItem",
    "PreferencePool",
    "Prompt",
    "RoundRecord",
    "Selection",
    "Sketch",
    "Strategy",
    "UnsupportedParameterError",
    "__version__",
    "by_preference",
    "generate_responses",
    "make_strategy",
    "read_labels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
