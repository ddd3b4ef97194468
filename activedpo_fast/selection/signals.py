"""Inputs of a strategy: one number or one row per response, computed only when asked for."""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.rewards import rewards_of

if TYPE_CHECKING:
    from activedpo_fast.pool.pool import PreferencePool
    from activedpo_fast.pool.rewards import Reward
    from activedpo_fast.store.rows import StoredRows

History = tuple[Tensor, Tensor]
"""Rows of the labeled responses, [H, k] floating, and their pairs of row numbers, int64 [t, 2].

For a signal with one number per response, such as a log-prob, the rows are float64 [H]. The labeled
pairs are in the same order in every history, but their row numbers may differ."""


class Signals(ABC):
    """The candidates of one selection, R responses and N pairs of them.

    Attributes:
        pairs: int64 [N, 2], the rows (a, b) of each candidate pair; ties are broken by this order.
        item_of_row: int64 [R], the item (its position in the pool) each response belongs to.
        prompt_of_row: int64 [R], the number of each response's prompt, if several items may share a
            prompt: prompts are numbered in order of first appearance in the pool, the same in all
            processes. None if every item has a different prompt.
        repeated: bool [R], responses that an earlier item of the same prompt also has; None for
            none.
        lengths: int64 [R], the number of tokens of each response, if log-probs and gradients are
            divided by it (the implicit reward is then based on means); None if they are not.
        device: the model's device; picks are made there if that is better (`greedy_logdet`).

    Every method may be expensive (it runs a model), so a strategy calls only those that it
    `requires`. A method that a subclass does not provide raises `ActiveDPOError` naming the signal.

    If several processes select together, each has the signals of its own part of the candidates,
    numbered from 0, and all have the same histories, covering all labeled pairs. A signal is then
    returned in all processes or raises in all of them.
    """

    pairs: Tensor
    item_of_row: Tensor
    lengths: Tensor | None = None
    prompt_of_row: Tensor | None = None
    repeated: Tensor | None = None
    device = torch.device("cpu")

    def gradients(self, *, relative: bool = False) -> Tensor | StoredRows:
        """Return rows g(x, y) = beta * grad log pi(y|x), projected, unnormalized; floating [R, k].

        With `relative`, some row of the same prompt may be subtracted from all of the prompt's
        rows. Callers that use only differences within a prompt ask for this: it can be cheaper.
        """
        self._missing("gradients")

    def history_gradients(self, *, relative: bool = False) -> History:
        """Return gradient rows of the labeled responses at the current parameters; may be empty."""
        self._missing("history_gradients")

    def hidden(self) -> Tensor:
        """Return the last layer's hidden state at each response's last token; floating [R, h]."""
        self._missing("hidden")

    def history_hidden(self) -> History:
        """Return hidden states of the labeled responses at the current parameters; may be empty."""
        self._missing("history_hidden")

    def logps(self) -> Tensor:
        """Return log pi(y|x) in nats, summed over the scored tokens; float64 [R]. See `lengths`."""
        self._missing("logps")

    def ref_logps(self) -> Tensor:
        """Return log pi_ref(y|x) in nats, summed over scored tokens; float64 [R]. See `lengths`."""
        self._missing("ref_logps")

    def history_logps(self) -> History:
        """Return current log pi of the labeled responses; float64 [H], may be empty."""
        self._missing("history_logps")

    def history_ref_logps(self) -> History:
        """Return log pi_ref of the labeled responses; float64 [H], may be empty."""
        self._missing("history_ref_logps")

    def rewards(self, reward: str | Reward) -> Tensor:
        """Return the reward of each response, float64 [R]; see `pool.rewards.rewards_of`."""
        self._missing("rewards")

    def cheap(self) -> Signals:
        """Return signals of the same candidates and rows whose gradients are cheap ones.

        They decide which candidates `only` is called with; see `docs/method.md` on two stages.
        """
        self._missing("cheap gradients")

    def only(self, indices: Tensor) -> Signals:
        """Return the signals of the candidates `indices`, int64 [m] ascending.

        Their rows may be fewer and numbered again from 0. Histories stay the same.
        """
        part = copy.copy(self)
        part.pairs = self.pairs[indices]
        return part

    def _missing(self, signal: str) -> NoReturn:
        raise ActiveDPOError(f"this selection needs the signal '{signal}', which is not available")


class TensorSignals(Signals):
    """Signals that already exist as tensors, for instance read from a feature store.

    Args:
        pairs: int64 [N, 2], candidate pairs of rows.
        item_of_row: int64 [R].
        prompt_of_row, repeated: see `Signals`.
        gradients: floating [R, k], in memory or `StoredRows`; hidden: floating [R, h].
        logps, ref_logps: floating [R], nats.
        history_gradients, history_hidden: (rows [H, k], pairs int64 [t, 2]) of the labeled pairs.
        history_logps, history_ref_logps: (numbers [H], pairs int64 [t, 2]) of the same pairs.
            If no history is given, nothing has been labeled and all histories are empty. If any is
            given, asking for a missing one is an error: a history must not be dropped silently.
        lengths: int64 [R], if log-probs are means over that many tokens.
        pool: the items of the responses, which rewards are of.
        cheap: signals of the same candidates with cheap gradients, for the first of two stages.

    Raises:
        ActiveDPOError: a shape, dtype or row number that does not fit; a signal that was not given.
    """

    def __init__(
        self,
        pairs: Tensor,
        item_of_row: Tensor,
        *,
        gradients: Tensor | StoredRows | None = None,
        hidden: Tensor | None = None,
        logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        history_gradients: History | None = None,
        history_hidden: History | None = None,
        history_logps: History | None = None,
        history_ref_logps: History | None = None,
        lengths: Tensor | None = None,
        prompt_of_row: Tensor | None = None,
        repeated: Tensor | None = None,
        pool: PreferencePool | None = None,
        cheap: Signals | None = None,
    ) -> None:
        if item_of_row.ndim != 1 or item_of_row.dtype != torch.int64:
            raise ActiveDPOError(
                f"item_of_row must be int64 [R], not {item_of_row.dtype} {list(item_of_row.shape)}"
            )
        n_rows = len(item_of_row)
        check_pairs(pairs, n_rows, "pairs")
        _check_matrix("gradients", gradients, n_rows)
        _check_matrix("hidden", hidden, n_rows)
        _check_vector("logps", logps, n_rows)
        _check_vector("ref_logps", ref_logps, n_rows)
        _check_count("lengths", lengths, n_rows)
        _check_matrix_history("history_gradients", history_gradients, gradients)
        _check_matrix_history("history_hidden", history_hidden, hidden)
        _check_vector_history("history_logps", history_logps)
        _check_vector_history("history_ref_logps", history_ref_logps)
        _check_numbers("prompt_of_row", prompt_of_row, torch.int64, n_rows)
        _check_numbers("repeated", repeated, torch.bool, n_rows)
        if cheap is not None and not cheap.pairs.equal(pairs):
            raise ActiveDPOError("cheap: it has other candidate pairs")
        self.pairs = pairs
        self.item_of_row = item_of_row
        self._cheap = cheap
        self.lengths = lengths
        self.prompt_of_row = prompt_of_row
        self.repeated = repeated
        self._pool = pool
        self._gradients = gradients
        self._hidden = hidden
        self._logps = logps
        self._ref_logps = ref_logps
        self._histories = {
            "history_gradients": history_gradients,
            "history_hidden": history_hidden,
            "history_logps": history_logps,
            "history_ref_logps": history_ref_logps,
        }

    def gradients(self, *, relative: bool = False) -> Tensor | StoredRows:
        if self._gradients is None:
            self._missing("gradients")
        return self._gradients

    def hidden(self) -> Tensor:
        return self._given(self._hidden, "hidden")

    def logps(self) -> Tensor:
        return self._given(self._logps, "logps").to(torch.float64)

    def ref_logps(self) -> Tensor:
        return self._given(self._ref_logps, "ref_logps").to(torch.float64)

    def history_gradients(self, *, relative: bool = False) -> History:
        return self._history("history_gradients", self.gradients)

    def history_hidden(self) -> History:
        return self._history("history_hidden", self.hidden)

    def history_logps(self) -> History:
        numbers, pairs = self._history("history_logps", self.logps)
        return numbers.to(torch.float64), pairs

    def history_ref_logps(self) -> History:
        numbers, pairs = self._history("history_ref_logps", self.ref_logps)
        return numbers.to(torch.float64), pairs

    def rewards(self, reward: str | Reward) -> Tensor:
        if self._pool is None:
            self._missing("rewards")
        return rewards_of(self._pool, reward)

    def cheap(self) -> Signals:
        return super().cheap() if self._cheap is None else self._cheap

    def _history(self, name: str, current: Callable[[], Tensor | StoredRows]) -> History:
        given = self._histories[name]
        if given is not None:
            return given
        if any(history is not None for history in self._histories.values()):
            self._missing(name)
        return _empty_history(current())

    def _given(self, tensor: Tensor | None, name: str) -> Tensor:
        if tensor is None:
            self._missing(name)
        return tensor


def _empty_history(rows: Tensor | StoredRows) -> History:
    """Return a history without labeled pairs, with width, dtype and device of `rows` [R, ...]."""
    pairs = torch.empty(0, 2, dtype=torch.int64, device=rows.device)
    return (rows[:0] if isinstance(rows, Tensor) else rows.take(pairs[:, 0])), pairs


def check_pairs(pairs: Tensor, n_rows: int, name: str) -> None:
    """Raise `ActiveDPOError` unless `pairs` is int64 [N, 2] with row numbers in 0..n_rows-1."""
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ActiveDPOError(f"{name} must be int64 [N, 2], not {pairs.dtype} {list(pairs.shape)}")
    outside = ((pairs < 0) | (pairs >= n_rows)).any(dim=1).nonzero()
    if len(outside):
        position = int(outside[0])
        raise ActiveDPOError(
            f"{name}[{position}] is {pairs[position].tolist()}, but there are {n_rows} rows"
        )


# -- checks of given signals; None, for one that is not given, passes ------------------------------


def _check_count(name: str, given: Tensor | StoredRows | None, n_rows: int | None) -> None:
    if given is not None and n_rows is not None and len(given) != n_rows:
        raise ActiveDPOError(f"{name} has {len(given)} rows for {n_rows} responses")


def _check_vector(name: str, values: Tensor | None, n_rows: int | None = None) -> None:
    _check_count(name, values, n_rows)
    if values is not None and (values.ndim != 1 or not values.is_floating_point()):
        raise ActiveDPOError(
            f"{name} must be floating-point numbers of one dimension, not {values.dtype} "
            f"{list(values.shape)}"
        )


def _check_matrix(name: str, rows: Tensor | StoredRows | None, n_rows: int | None = None) -> None:
    if rows is not None and (rows.ndim != 2 or not rows.is_floating_point()):
        raise ActiveDPOError(
            f"{name} must be a floating-point matrix [R, k], not {rows.dtype} {list(rows.shape)}"
        )
    _check_count(name, rows, n_rows)


def _check_numbers(name: str, numbers: Tensor | None, dtype: torch.dtype, n_rows: int) -> None:
    if numbers is not None and (numbers.dtype, numbers.shape) != (dtype, (n_rows,)):
        raise ActiveDPOError(
            f"{name} must be {dtype} [{n_rows}], not {numbers.dtype} {list(numbers.shape)}"
        )


def _check_matrix_history(
    name: str, history: History | None, candidates: Tensor | StoredRows | None
) -> None:
    if history is None:
        return
    rows, labeled = history
    _check_matrix(name, rows)
    check_pairs(labeled, len(rows), name)
    if candidates is not None and rows.shape[1] != candidates.shape[1]:
        raise ActiveDPOError(
            f"{name} has {rows.shape[1]} columns, the candidates have {candidates.shape[1]}"
        )


def _check_vector_history(name: str, history: History | None) -> None:
    if history is not None:
        numbers, labeled = history
        _check_vector(name, numbers)
        check_pairs(labeled, len(numbers), name)
