"""`ActiveDPOSelector`: from a model and a pool to the pairs to label next."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activedpo_fast._modes import in_own_modes
from activedpo_fast.data import PreferencePool
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.features.extractor import FeatureExtractor
from activedpo_fast.features.sketch import Sketch
from activedpo_fast.features.supported import require_supported
from activedpo_fast.presets import preset as find_preset
from activedpo_fast.ref_model import RefModel, check_ref_model, reference_policy
from activedpo_fast.selection.greedy import check_n
from activedpo_fast.selection.prompts import PairFinder, PoolPrompts, first_of_each
from activedpo_fast.selection.result import Pick, Selection
from activedpo_fast.selection.rules import PickRules, random_seed, warn_if_fewer
from activedpo_fast.selection.shares import Shares, pool_text
from activedpo_fast.selection.signals import History, Signals
from activedpo_fast.selection.strategies import Strategy, make_strategy
from activedpo_fast.template import check_template_kwargs, own_template_kwargs, template_kwargs
from activedpo_fast.tokenization import (
    DEFAULT_MAX_LENGTH,
    DEFAULT_TRUNCATION_MODE,
    TokenizedPool,
    tokenize_pool,
)

logger = logging.getLogger(__name__)

Labelled = Selection | Sequence[Selection]


class ActiveDPOSelector:
    """Chooses the pairs of a pool whose labels tell most about the model that is being trained.

        selector = ActiveDPOSelector(model, processing_class=tokenizer)
        picked = selector.select(pool, 50)
        dataset = picked.to_dataset(labels)        # ready for trl.DPOTrainer

    Every call to `select` looks at the model's weights as they are then. The model is left as it
    was found.

    Args:
        model: the policy π_θ, a causal LM with trainable linear layers (PEFT LoRA, usually).
        processing_class: its tokenizer.
        strategy: "activedpo" (default), "random", "apo", "aplp", "margin_small", "margin_large",
            "adpo_plus", "trace", "trace_plus", or a `Strategy`.
        preset: "paper" takes the settings of arXiv 2505.19241; an option given here wins over it.
        beta: β of the implicit reward β log(π/π_ref); 0.1 is also TRL's default.
        length_normalized: the implicit reward is β times the difference of the *mean* log-probs of
            a response's tokens, which some losses train (TRL's "ipo" and "sigmoid_norm";
            `selector_settings` looks at `loss_type`).
        sketch: "sjlt" (default), "rademacher", "kronecker", or "none" for the exact gradient rows.
        proj_dim: k, the number of columns of a sketched row; default 8192.
        seed: of the sketch and of the strategy "random".
        normalize: "response" (default; each gradient to unit norm before the difference), "pair"
            (the difference to unit norm) or "none" (also None; the default of "adpo_plus").
        lam, kappa: λ and κ of V = (λ/κ) I + Σ φφᵀ; both 1 by default. The paper does not state λ.
        max_length, truncation_mode: as in `trl.DPOConfig`, with its defaults; give those that you
            train with (`activedpo_fast.trl.selector_settings` reads them from a DPOConfig).
        chat_template_kwargs: passed to the chat template, as by `tokenize_pool`. Picks remember
            them, and `Selection.to_dataset` gives them to the trainer; give `generate_responses`
            the same.
        ref_model: π_ref where a strategy needs it (aplp, margin_small, margin_large, adpo_plus,
            trace_plus): a model, the name of an adapter of `model`, or the weights of its adapter
            as `activedpo_fast.trl.adapter_state` gives them. Default: the adapter "ref" of a PEFT
            model that has one, as DPOTrainer makes it, else the base model, all adapters
            disabled. Where DPO goes on from an adapter that SFT has trained, DPOTrainer's
            reference is that adapter: without "ref", pass its weights.
        strategy_options: further options of the strategy (see `make_strategy`).
        max_tokens_per_batch, precision, verify: see `FeatureExtractor`.

    Raises:
        ActiveDPOError: an option that is unknown or out of range.

    Source: Lin et al., ActiveDPO, arXiv 2505.19241; see docs/method.md.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        *,
        strategy: str | Strategy | None = None,
        preset: str | None = None,
        beta: float = 0.1,
        length_normalized: bool = False,
        sketch: str = "sjlt",
        proj_dim: int | None = None,
        seed: int = 0,
        normalize: str | None = "default",
        lam: float = 1.0,
        kappa: float = 1.0,
        max_length: int | None = DEFAULT_MAX_LENGTH,
        truncation_mode: str = DEFAULT_TRUNCATION_MODE,
        chat_template_kwargs: dict[str, Any] | None = None,
        ref_model: RefModel | None = None,
        strategy_options: dict[str, Any] | None = None,
        max_tokens_per_batch: int | None = None,
        precision: str | None = None,
        verify: bool = True,
    ) -> None:
        defaults: dict[str, Any] = {
            "strategy": "activedpo", "proj_dim": 8192, "normalize": "response"
        }
        if preset is not None:
            defaults.update(find_preset(preset).selection)
        check_ref_model(model, ref_model)
        check_template_kwargs(chat_template_kwargs)
        self.model = model
        self.processing_class = processing_class
        self.strategy = defaults["strategy"] if strategy is None else strategy
        self.seed = seed
        self.ref_model = ref_model
        given = {} if normalize == "default" else {
            "normalize": None if normalize == "none" else normalize}
        ridge = {"lam": lam, "kappa": kappa}
        self._options: dict[str, dict[str, Any]] = {
            "activedpo": {"normalize": defaults["normalize"], **ridge, **given},
            "adpo_plus": {"beta": beta, **ridge, **given},
            "trace": ridge,
            "trace_plus": {"beta": beta, **ridge},
            "aplp": {"beta": beta},
            "margin_small": {"beta": beta},
            "margin_large": {"beta": beta},
        }
        self._strategy_options = dict(strategy_options or {})
        self._tokenization: dict[str, Any] = {
            "max_length": max_length,
            "truncation_mode": truncation_mode,
            "chat_template_kwargs": chat_template_kwargs,
        }
        dim = defaults["proj_dim"] if proj_dim is None else proj_dim
        pad_token_id = processing_class.pad_token_id
        self.extractor = FeatureExtractor(
            model,
            Sketch(sketch, None if sketch == "none" else dim, seed),
            beta=beta,
            length_normalized=length_normalized,
            pad_token_id=0 if pad_token_id is None else pad_token_id,
            max_tokens_per_batch=max_tokens_per_batch,
            precision=precision,
            verify=verify,
        )
        self.last_timings: dict[str, float] = {}
        # An unknown name or option, or a model that will not do, is better told now than after an
        # hour.
        needed = getattr(self._make_strategy(""), "requires", ())
        require_supported(model, gradients="gradients" in needed,
                          pad_token_id=self.extractor.pad_token_id)
        if isinstance(ref_model, torch.nn.Module):
            require_supported(ref_model, pad_token_id=self.extractor.pad_token_id)

    @in_own_modes
    def select(
        self,
        pool: PreferencePool,
        n: int,
        *,
        labelled: Labelled | None = None,
        asked: Labelled | None = None,
        rules: PickRules | None = None,
        fewer_ok: bool = False,
        group: dist.ProcessGroup | None = None,
        show_progress: bool | None = None,
    ) -> Selection:
        """Choose `n` pairs of `pool`, best first.

        Args:
            pool: prompts with two or more responses each.
            n: how many pairs.
            labelled: the pairs that have a preference, one earlier `Selection` or several (see
                `by_preference`: pairs without one are `asked`). Their features are taken again at
                the model's current weights and enter V, with the selector's own
                `chat_template_kwargs` (a line of the log says so where the picks have others); a
                pair of `pool` that is among them is no candidate. It is among them if its prompt
                (see `PickRules.prompt_by`) and its two responses are the same, in either order and
                under whatever id.
            asked: pairs that were asked before and have no preference: out for labeling, or
                answered by "skip". They are no candidates either, and do not enter V. See
                `by_preference` and `read_pending`.
            rules: what the picks have to observe besides. There may then be fewer than n, which
                the log says.
            fewer_ok: pick all candidates where there are fewer than n, with one line of the log.
            group: the processes that select together: pass `torch.distributed.group.WORLD` under
                torchrun or `accelerate launch`. Each has the same model (not wrapped in DDP, whose
                `.module` it is) and calls `select` with the same arguments; each takes the
                features of its own stretch of the pool and of the labelled pairs, and all return
                the selection that one process would. They wait for the slowest, so the group's
                timeout has to be longer than features of one part may take. Default: this process
                selects alone, under torchrun too, where every process then does the whole work.
            show_progress: True, False, or None for a bar on terminals only; the first process of a
                group alone shows it.

        Returns:
            The picks. `last_timings` then has the seconds spent in "features" and in "select".

        Raises:
            ActiveDPOError: fewer than n candidates (before any rule, without `fewer_ok`); rules
                that do not fit the pool or leave no candidate; a pool or model that cannot be
                handled; another process of the group failed, was lost, or has other arguments,
                settings or weights. All
                processes raise then.
        """
        if not isinstance(pool, PreferencePool):
            raise ActiveDPOError(
                f"pool: expected a PreferencePool, got {type(pool).__name__}; make one with "
                "PreferencePool.from_dataset, from_rows or load")
        started = time.perf_counter()
        history = [pick for selection in _as_list(labelled, "labelled") for pick in selection]
        common = self._tokenization["chat_template_kwargs"]
        undecided = [pick for selection in _as_list(asked, "asked") for pick in selection]
        shares = Shares(group)
        if shares.rank == 0:
            _tell_of_other_arguments(history, common)
        strategy = self._make_strategy(pool.fingerprint())
        if group is not None:
            self._require_same(shares, pool, n, history, undecided, rules, strategy)
        prompts = PoolPrompts.of(pool, rules.prompt_by if rules is not None else None)
        signals = _ModelSignals(self, pool, history, undecided, prompts, shares, show_progress)
        found = len(signals.candidates)
        if fewer_ok and isinstance(n, int) and found < n:
            if shares.rank == 0:
                logger.warning("%d pairs are picked instead of %d: there are no other candidates",
                               found, n)
            n = found
        n = check_n(n, found)
        eligible = None
        if rules is not None:
            eligible = rules.bind(pool, signals.candidates, n)
            if group is not None:
                eligible = eligible.part(signals.mine.start, signals.mine.stop)
        ranking = strategy.select(signals, n, eligible=eligible, group=group)
        if eligible is not None and shares.rank == 0:
            warn_if_fewer(len(ranking.indices), n, eligible)
        total = time.perf_counter() - started
        self.last_timings = {"features": signals.seconds, "select": total - signals.seconds}
        return make_selection(pool, signals.candidates, ranking, strategy.name, common)

    def tokenize(self, pool: PreferencePool, *, show_progress: bool | None = None) -> TokenizedPool:
        """The tokens that features are taken of; the same as DPOTrainer trains on."""
        return tokenize_pool(
            pool, self.processing_class, show_progress=show_progress, **self._tokenization
        )

    def _make_strategy(self, pool_fingerprint: str) -> Strategy:
        if isinstance(self.strategy, Strategy):
            return self.strategy
        options = dict(self._options.get(self.strategy, {}))
        if self.strategy == "random":
            options["seed"] = random_seed(self.seed, pool_fingerprint)
        return make_strategy(self.strategy, **{**options, **self._strategy_options})

    def _require_same(
        self, shares: Shares, pool: PreferencePool, n: int, history: list[Pick],
        undecided: list[Pick], rules: PickRules | None, strategy: Strategy,
    ) -> None:
        """Raise `ActiveDPOError` unless all processes were given the same."""
        options = {name: value for name, value in vars(strategy).items()
                   if isinstance(value, (str, int, float, type(None)))}
        extractor = self.extractor
        shares.require_same(
            {
                "pool": pool_text(pool, rules),
                "n": repr(n),
                "labelled": repr([(pick.id, pick.prompt, pick.responses,
                                   pick.item_chat_template_kwargs) for pick in history]),
                "asked": repr([(pick.id, pick.prompt, pick.responses,
                                pick.item_chat_template_kwargs) for pick in undecided]),
                "rules": repr(rules),
                "strategy": repr((strategy.name, sorted(options.items()))),
                "sketch": repr(extractor.sketch),
                "beta or precision": repr((extractor.beta, extractor.precision)),
                "length_normalized": repr(extractor.length_normalized),
                "ref_model": (repr(self.ref_model) if isinstance(self.ref_model, str)
                              else type(self.ref_model).__name__),
                "tokenization": repr(sorted(self._tokenization.items())),
            },
            {"norm of the trainable weights": _norm(self.model)},
        )


class _ModelSignals(Signals):
    """Signals taken from the model when a strategy asks for them; keeps the seconds spent.

    They are those of this process's part of the pool. The features of labelled pairs are taken by
    all processes together.

    Attributes:
        candidates: int64 [N, 2], the candidate pairs of the whole pool.
        mine: which of them are of this process's part: `pairs`, there numbered from its first row.
    """

    def __init__(
        self,
        selector: ActiveDPOSelector,
        pool: PreferencePool,
        history: list[Pick],
        undecided: list[Pick],
        prompts: PoolPrompts,
        shares: Shares,
        show_progress: bool | None,
    ) -> None:
        self._selector = selector
        self.device = next(selector.model.parameters()).device
        self._shares = shares
        self._show_progress = show_progress if shares.rank == 0 else False
        self._cache: dict[str, Any] = {}
        self.seconds = 0.0
        part = shares.part(pool)
        self._rows = part.rows
        self._tokenized: TokenizedPool = self._taken("tokenized", lambda: selector.tokenize(
            pool[part.items.start:part.items.stop], show_progress=self._show_progress))
        skipped = torch.tensor(self._tokenized.skipped, dtype=torch.int64) + part.items.start
        self._in_pool, self._elsewhere = split_history(pool, history)
        known = torch.cat([self._in_pool, split_history(pool, undecided)[0]])
        self.candidates = candidate_pairs(pool, known, shares.gather(skipped).tolist(), prompts,
                                          log=shares.rank == 0)
        self.mine = part.pairs(self.candidates)
        self.pairs = self.candidates[self.mine.start:self.mine.stop] - part.rows.start
        self.item_of_row = part.item_of_row(pool)
        self.lengths = selector.extractor.lengths(self._tokenized)
        mine = slice(part.rows.start, part.rows.stop)
        self.prompt_of_row = prompts.of_row(pool)[mine]
        self.repeated = prompts.repeats()[mine]

    def gradients(self, *, relative: bool = False) -> torch.Tensor:
        def take() -> torch.Tensor:
            rows = self._selector.extractor.gradients(
                self._tokenized, relative=relative, show_progress=self._show_progress)
            self._cache.setdefault("logps", rows.logps)  # they come for free
            return rows.gradients

        return self._taken(f"gradients {relative=}", take)

    def history_gradients(self, *, relative: bool = False) -> History:
        def take(tokens: TokenizedPool) -> torch.Tensor:
            rows = self._selector.extractor.gradients(
                tokens, relative=relative, show_progress=self._show_progress)
            self._cache.setdefault("outside logps", rows.logps)
            return rows.gradients

        return self._once(f"history_gradients {relative=}", lambda: self._history(
            self.gradients(relative=relative), take))

    def hidden(self) -> torch.Tensor:
        extractor = self._selector.extractor
        return self._taken("hidden", lambda: extractor.hidden(
            self._tokenized, show_progress=self._show_progress))

    def history_hidden(self) -> History:
        extractor = self._selector.extractor
        return self._once("history_hidden", lambda: self._history(
            self.hidden(),
            lambda tokens: extractor.hidden(tokens, show_progress=self._show_progress),
        ))

    def logps(self) -> torch.Tensor:
        extractor = self._selector.extractor
        return self._taken("logps", lambda: extractor.logps(
            self._tokenized, show_progress=self._show_progress))

    def history_logps(self) -> History:
        extractor = self._selector.extractor
        return self._once("history_logps", lambda: self._history(
            self.logps(),
            lambda tokens: self._once("outside logps", lambda: extractor.logps(
                tokens, show_progress=self._show_progress)),
        ))

    def ref_logps(self) -> torch.Tensor:
        return self._taken("ref_logps", lambda: self._reference_logps(self._tokenized))

    def history_ref_logps(self) -> History:
        return self._once("history_ref_logps", lambda: self._history(
            self.ref_logps(), self._reference_logps))

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self._cache:
            before, started = self.seconds, time.perf_counter()
            self._cache[name] = compute()
            # Signals may be taken from within each other: no second is to count twice.
            self.seconds = before + time.perf_counter() - started
        return self._cache[name]

    def _taken(self, name: str, compute: Callable[[], Any]) -> Any:
        """As `_once`, of what each process takes of its own part."""
        return self._once(name, lambda: self._shares.check(compute))

    def _history(
        self, rows: torch.Tensor, extract: Callable[[TokenizedPool], torch.Tensor]
    ) -> History:
        """Rows and pairs of all that is labelled, the same in all processes."""
        used, pairs_inside = torch.unique(self._in_pool, return_inverse=True)
        pairs_inside = pairs_inside.view(-1, 2)
        mine = used[(used >= self._rows.start) & (used < self._rows.stop)] - self._rows.start
        inside = self._shares.gather(rows[mine])
        if not self._elsewhere:
            return inside, pairs_inside
        tokens = self._taken("outside tokens", self._outside_tokens)
        outside = self._shares.gather(self._shares.check(
            lambda: rows[:0] if tokens is None else extract(tokens)))
        pairs_outside = torch.arange(2 * len(self._elsewhere)).view(-1, 2) + len(inside)
        return torch.cat([inside, outside]), torch.cat([pairs_inside, pairs_outside])

    def _outside_tokens(self) -> TokenizedPool | None:
        """Of this process's stretch of the labelled pairs that are not in the pool, if any."""
        mine = self._elsewhere[self._shares.stretch(len(self._elsewhere))]
        if not mine:
            return None
        return self._selector.tokenize(Selection(tuple(mine), strategy="history").as_pool())

    def _reference_logps(self, tokens: TokenizedPool) -> torch.Tensor:
        selector = self._selector
        with reference_policy(selector.model, selector.ref_model) as model:
            return selector.extractor.logps(
                tokens, model=model, show_progress=self._show_progress)


def candidate_pairs(
    pool: PreferencePool, labelled: torch.Tensor, skipped: Sequence[int],
    prompts: PoolPrompts | None = None, *, log: bool = True,
) -> torch.Tensor:
    """All pairs of `pool` except the labelled ones and those of skipped items; int64 [N, 2].

    A pair whose prompt and responses several items have is there once, as that of the first item;
    the log says how many are left out for that.

    Args:
        labelled: int64 [t, 2], pairs of row numbers in either order.
        skipped: positions of items that DPOTrainer would drop.
        prompts: of `pool`; by its texts if not given.
    """
    prompts = PoolPrompts.of(pool) if prompts is None else prompts
    pairs = pool.pairs()
    code = prompts.pair_codes(pairs)
    keep = torch.ones(len(pairs), dtype=torch.bool)
    if len(labelled):
        keep &= ~torch.isin(code, prompts.pair_codes(labelled))
    if len(skipped):
        item = torch.searchsorted(pool.response_offsets, pairs[:, 0].contiguous(), right=True) - 1
        keep &= ~torch.isin(item, torch.tensor(list(skipped)))
    pairs, code = pairs[keep], code[keep]
    if bool(prompts.repeats().any()):
        first = first_of_each(code)
        if log and not first.all():
            logger.info("%d of %d pairs have the prompt and responses of an earlier one: each is a "
                        "candidate once", int((~first).sum()), len(pairs))
        pairs = pairs[first]
    return pairs


def split_history(
    pool: PreferencePool, history: Sequence[Pick]
) -> tuple[torch.Tensor, list[Pick]]:
    """Labelled picks that are pairs of `pool`, as int64 [t, 2] row numbers, and all the others.

    A pick is a pair of the item that has its texts: that with its id or else the first.
    """
    inside: list[list[int]] = []
    elsewhere: list[Pick] = []
    finder = PairFinder(pool)
    for pick in history:
        rows = finder.rows(
            pick.id, pick.prompt, pick.responses, pick.item_chat_template_kwargs)
        if rows is None:
            elsewhere.append(pick)
        else:
            inside.append(rows)
    return torch.tensor(inside, dtype=torch.int64).view(-1, 2), elsewhere


def make_selection(
    pool: PreferencePool, pairs: torch.Tensor, ranking: Any, strategy: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Selection:
    """The picks that a strategy's ranking of candidate `pairs` stands for.

    `chat_template_kwargs` are those that the whole pool was tokenized with.
    """
    picks = []
    for rank, (index, score) in enumerate(
        zip(ranking.indices.tolist(), ranking.scores.tolist(), strict=True)
    ):
        (position, first), (_, second) = (pool.locate(row) for row in pairs[index].tolist())
        item = pool[position]
        arguments = template_kwargs(item.extra, chat_template_kwargs) if pool.is_chat else None
        own = own_template_kwargs(item.extra) if pool.is_chat else None
        picks.append(Pick(item.id, (first, second), score, rank, item.prompt,
                          (item.responses[first], item.responses[second]), arguments or None, own))
    return Selection(tuple(picks), strategy)


def _tell_of_other_arguments(
    history: Sequence[Pick], common: Mapping[str, Any] | None
) -> None:
    """Log how many labelled chat pairs were picked with other arguments of the template."""
    other = sum(
        (pick.chat_template_kwargs or {}) != {**(common or {}),
                                              **(pick.item_chat_template_kwargs or {})}
        for pick in history if not isinstance(pick.prompt, str)
    )
    if other:
        logger.warning("%d of %d labelled pairs were picked with other chat_template_kwargs: their "
                       "features are taken with the selector's; their to_dataset keeps the others",
                       other, len(history))


def _norm(model: PreTrainedModel | PeftModel) -> float:
    """Of all trainable weights together."""
    norms = [torch.linalg.vector_norm(p.detach(), dtype=torch.float64).cpu()
             for p in model.parameters() if p.requires_grad]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _as_list(given: Labelled | None, name: str) -> list[Selection]:
    if given is None:
        return []
    listed = [given] if isinstance(given, (Selection, str)) else given
    for entry in listed if isinstance(listed, Iterable) else [listed]:
        if not isinstance(entry, Selection):
            raise ActiveDPOError(f"{name}: expected a Selection, or several, got "
                                 f"{type(entry).__name__}; read_labels reads them from a file")
    return list(listed)
