"""Signals computed with the model when a strategy asks for them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.models.ref_model import RefModel, reference_policy
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.rewards import Reward, rewards_of
from activedpo_fast.pool.tokens import TokenizedPool
from activedpo_fast.selection.candidates import Candidates
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.signals import History, Signals

T = TypeVar("T")


@dataclass
class _Watch:
    """Seconds spent on signals, of one object and of those made from it."""

    seconds: float = 0.0


class ModelSignals(Signals):
    """The signals of this process's part of the candidates, and the seconds they took.

    Signals of labeled pairs are computed by all processes together. Signals that do not depend on
    which gradients are taken are shared with those made by `cheap`.

    Args:
        cheap: the extractor of the rows of the signals that `cheap` gives.
        tokens: of this process's part of the pool.
        elsewhere: labeled picks that are not pairs of the pool.
        tokenize: tokenizes the texts of `elsewhere`.
        ref_model: see `ActiveDPOSelector`.
    """

    prompt_of_row: Tensor
    repeated: Tensor

    def __init__(
        self,
        extractor: FeatureExtractor,
        cheap: FeatureExtractor,
        candidates: Candidates,
        tokens: TokenizedPool,
        elsewhere: Sequence[Pick],
        tokenize: Callable[[PreferencePool], TokenizedPool],
        ref_model: RefModel | None,
        processes: PoolProcesses,
        show_progress: bool | None,
    ) -> None:
        self._extractor, self._cheap = extractor, cheap
        self._candidates = candidates
        self._tokens = tokens
        self._in_pool, self._elsewhere = candidates.labeled, elsewhere
        self._tokenize = tokenize
        self._ref_model = ref_model
        self._processes = processes
        self._show_progress = show_progress
        self._cache: dict[str, Any] = {}
        self._watch = _Watch()
        self.device = next(extractor.model.parameters()).device
        rows = candidates.part.rows
        self._row_ids = torch.arange(rows.start, rows.stop)  # in the pool
        mine = slice(rows.start, rows.stop)
        self.pairs = candidates.own_pairs
        self.item_of_row = candidates.part.item_of_row(candidates.pool)
        self.lengths = extractor.lengths(tokens)
        self.prompt_of_row = candidates.prompts.of_row(candidates.pool)[mine]
        self.repeated = candidates.prompts.repeats()[mine]

    @property
    def seconds(self) -> float:
        return self._watch.seconds

    def cheap(self) -> ModelSignals:
        twin = copy.copy(self)
        twin._extractor = self._cheap
        return twin

    def only(self, indices: Tensor) -> ModelSignals:
        """Return the signals of some candidates, with the rows of these and of labeled pairs alone.

        What is known of all rows is forgotten here: their gradients are large.
        """
        pairs = self.pairs[indices]
        labeled = torch.isin(self._row_ids, self._in_pool).nonzero().flatten()
        rows = torch.cat([pairs.flatten(), labeled]).unique()
        if not len(rows):  # a process that has none of these takes part with its first item
            rows = (self.item_of_row == self.item_of_row[0]).nonzero().flatten()
        part = copy.copy(self)
        part.pairs = torch.searchsorted(rows, pairs)
        part._row_ids, part._tokens = self._row_ids[rows], self._tokens.only(rows.tolist())
        part.item_of_row, part.prompt_of_row = self.item_of_row[rows], self.prompt_of_row[rows]
        part.repeated = self.repeated[rows]
        part.lengths = None if self.lengths is None else self.lengths[rows]
        whole = ("outside tokens", "history_ref_logps")
        part._cache = {name: self._cache[name] for name in whole if name in self._cache}
        if "ref_logps" in self._cache:
            part._cache["ref_logps"] = self._cache["ref_logps"][rows]
        self._cache.clear()
        return part

    def gradients(self, *, relative: bool = False) -> Tensor:
        def compute() -> Tensor:
            rows = self._extractor.gradients(
                self._tokens, relative=relative, show_progress=self._show_progress
            )
            self._cache.setdefault("logps", rows.logps)  # they come for free
            return rows.gradients

        return self._own(f"gradients of {self._extractor.gradient}, {relative=}", compute)

    def history_gradients(self, *, relative: bool = False) -> History:
        def extract(tokens: TokenizedPool) -> Tensor:
            rows = self._extractor.gradients(
                tokens, relative=relative, show_progress=self._show_progress
            )
            self._cache.setdefault("outside logps", rows.logps)
            return rows.gradients

        return self._once(
            f"history_gradients of {self._extractor.gradient}, {relative=}",
            lambda: self._history(self.gradients(relative=relative), extract),
        )

    def hidden(self) -> Tensor:
        return self._own(
            "hidden",
            lambda: self._extractor.hidden(self._tokens, show_progress=self._show_progress),
        )

    def history_hidden(self) -> History:
        return self._once(
            "history_hidden",
            lambda: self._history(
                self.hidden(),
                lambda tokens: self._extractor.hidden(tokens, show_progress=self._show_progress),
            ),
        )

    def logps(self) -> Tensor:
        return self._own(
            "logps", lambda: self._extractor.logps(self._tokens, show_progress=self._show_progress)
        )

    def history_logps(self) -> History:
        return self._once(
            "history_logps",
            lambda: self._history(
                self.logps(),
                lambda tokens: self._once(
                    "outside logps",
                    lambda: self._extractor.logps(tokens, show_progress=self._show_progress),
                ),
            ),
        )

    def ref_logps(self) -> Tensor:
        return self._own("ref_logps", lambda: self._reference_logps(self._tokens))

    def history_ref_logps(self) -> History:
        return self._once(
            "history_ref_logps", lambda: self._history(self.ref_logps(), self._reference_logps)
        )

    def rewards(self, reward: str | Reward) -> Tensor:
        part, pool = self._candidates.part, self._candidates.pool
        rows = self._row_ids - part.rows.start
        own = pool[part.items.start : part.items.stop]
        return self._own("rewards", lambda: rewards_of(own, reward)[rows])

    def _once(self, name: str, compute: Callable[[], T]) -> T:
        if name not in self._cache:
            before, started = self._watch.seconds, time.perf_counter()
            self._cache[name] = compute()
            # Computing one signal may compute another: do not count its time twice.
            self._watch.seconds = before + time.perf_counter() - started
        found: T = self._cache[name]
        return found

    def _own(self, name: str, compute: Callable[[], T]) -> T:
        """Like `_once`, for values that each process computes for its own part."""
        return self._once(name, lambda: self._processes.check(compute))

    def _history(self, rows: Tensor, extract: Callable[[TokenizedPool], Tensor]) -> History:
        """Return rows and pairs of all labeled pairs, the same in all processes."""
        used, pairs_inside = torch.unique(self._in_pool, return_inverse=True)
        pairs_inside = pairs_inside.view(-1, 2)
        inside = self._processes.gather(rows[torch.isin(self._row_ids, used)])
        if not self._elsewhere:
            return inside, pairs_inside
        tokens = self._own("outside tokens", self._outside_tokens)
        outside = self._processes.gather(
            self._processes.check(lambda: rows[:0] if tokens is None else extract(tokens))
        )
        pairs_outside = torch.arange(2 * len(self._elsewhere)).view(-1, 2) + len(inside)
        return torch.cat([inside, outside]), torch.cat([pairs_inside, pairs_outside])

    def _outside_tokens(self) -> TokenizedPool | None:
        """Tokenize this process's share of the labeled pairs that are not in the pool, if any."""
        mine = self._elsewhere[self._processes.stretch(len(self._elsewhere))]
        if not mine:
            return None
        return self._tokenize(Selection(tuple(mine), strategy="history").as_pool())

    def _reference_logps(self, tokens: TokenizedPool) -> Tensor:
        with reference_policy(self._extractor.model, self._ref_model) as model:
            return self._extractor.logps(tokens, model=model, show_progress=self._show_progress)
