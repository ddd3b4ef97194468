"""One cell of the tables: a model with something to train, against the definition."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import transformers
from torch import Tensor, nn

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.batches import Layout
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.gradients.trainable import trainable_parameters
from activedpo_fast.models.adapters import causal_lm
from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse
from benchmarks.rows.batches import trainable
from benchmarks.support.architectures import END, PAD
from benchmarks.support.definition import defined_gradients, relative_error

# A row is wrong if it is further from the exact one than this, and than this multiple of the
# rounding of the model's own numbers.
TOLERANCE, TIMES_ROUNDING = 1e-4, 10.0

_LONG = [7 + (n * n + 3 * n) % 113 for n in range(22)]  # longer than the sliding windows
# Prompts and responses: of one token, longer than the windows, with repeated tokens, with the
# padding token in the middle, and one that begins like another.
_ITEMS: list[tuple[list[int], list[list[int]]]] = [
    ([5, 17, 40, 8, 22, 9], [[31, 12, 60, END], [31, 12, 61, 62, 63, 64, 65, 66, END]]),
    ([90], [[END], [*range(20, 35), END]]),
    (_LONG, [[7, 7, 7, 7, 7, END], [14, PAD, 15, END]]),
    ([33, 33, 33, 33], [[100, 101], [100, 101, END]]),
]


@dataclass(frozen=True)
class Cell:
    """What became of an adapter on a model.

    Attributes:
        verdict: "captured" by hooks, from "autograd", "refused" in one line, "wrong", "failed" with
            another error than the library's own, or "impossible" without the library too.
        layout: of captured gradients: "shared" prompts, "whole" sequences in batches, or "alone".
        error: the largest error of a row relative to its norm, in float64 against the exact one.
        rounding: the same of the definition, computed as the model computes.
        difference: the same of the rows, against the definition as the model computes it.
        message: what was said if there are no rows.
    """

    verdict: str
    layout: str | None = None
    error: float | None = None
    rounding: float | None = None
    difference: float | None = None
    message: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def responses(start: int | None = None) -> TokenizedPool:
    """Return prompts and responses that are easy to get wrong.

    start: what the decoder begins with, of a model that has an encoder.
    """
    sequences, items = [], []
    for number, (prompt, continued) in enumerate(_ITEMS):
        before = prompt if start is None else [*prompt, start]
        for response in continued:
            sequences.append(TokenizedResponse([*before, *response], len(before)))
            items.append(number)
    ids = [str(number) for number in range(len(_ITEMS))]
    return TokenizedPool(sequences, [], items, ids, encoder_decoder=start is not None)


def measure(make: Callable[[], Any], exact: Callable[[Any], nn.Module] | None = None) -> Cell:
    """Return the cell of the model that `make` returns.

    Args:
        exact: returns the same model in float64; by default a converted copy.
    """
    with _quiet():
        try:
            model = make()
            config: Any = causal_lm(model).config
            pool = responses(config.decoder_start_token_id if config.is_encoder_decoder else None)
            in_float64 = (_in_float64 if exact is None else exact)(model)  # before it keeps states
            defined = defined_gradients(model, pool, trainable(model))
            expected = defined_gradients(in_float64, pool, trainable(in_float64))
        except Exception as error:  # of other packages
            return Cell("impossible", message=_one_line(error))
        try:
            extractor = FeatureExtractor(model, Sketch("none"), beta=1.0, pad_token_id=PAD)
            found = extractor.gradients(pool).gradients
            how = extractor._how_gradients(pool, trainable_parameters(model))
        except ActiveDPOError as error:
            return Cell("refused", message=_one_line(error))
        except Exception as error:
            return Cell("failed", message=_one_line(error))
    return _judged(found, defined, expected, how.layout if how.by_hooks else None)


def _in_float64(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model).double()
    # Grouped matrix products, the default for experts, have no kernel for float64.
    causal_lm(found).set_experts_implementation("eager")  # type: ignore[operator]
    return found


def _judged(found: Tensor, defined: Tensor, expected: Tensor, layout: Layout | None) -> Cell:
    error, rounding = relative_error(found, expected), relative_error(defined, expected)
    verdict = "autograd" if layout is None else "captured"
    if not error <= max(TOLERANCE, TIMES_ROUNDING * rounding):  # NaN is wrong, too
        verdict = "wrong"
    return Cell(
        verdict,
        layout=None if layout is None else layout.name.lower(),
        error=_short(error),
        rounding=_short(rounding),
        difference=_short(relative_error(found, defined)),
    )


def _short(value: float) -> float | None:
    return float(f"{value:.1e}") if math.isfinite(value) else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: each cell says what came of it."""
    before, level = logging.root.manager.disable, transformers.logging.get_verbosity()
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        transformers.logging.set_verbosity(level)
