"""The command `activedpo select`: picks the pairs of a store to label next."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from activedpo_fast._files import FilePath, read_text
from activedpo_fast.cli.outputs import check_output
from activedpo_fast.distributed.launcher import launched
from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.labeled_pairs import read_labeled_pairs
from activedpo_fast.pool.files import jsonl_rows
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.candidates import Candidates, pool_text
from activedpo_fast.selection.preselection import check_preselectable
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.rules import PickRules, random_seed
from activedpo_fast.selection.run import run_selection, tells_nothing
from activedpo_fast.selection.signals import History, TensorSignals
from activedpo_fast.selection.strategies import make_strategy
from activedpo_fast.settings import SelectorConfig
from activedpo_fast.store.rows import StoredRows
from activedpo_fast.store.store import FeatureStore

logger = logging.getLogger(__name__)

_IN_MEMORY_BYTES = 2**30  # up to this size gradient rows are loaded; beyond it, read as needed


def select_pairs(
    store_path: FilePath,
    output: FilePath,
    *,
    n: int,
    args: SelectorConfig | None = None,
    labeled: FilePath | None = None,
    rules: PickRules | None = None,
    exclude: FilePath | None = None,
    preselect_by: FilePath | None = None,
    show_progress: bool | None = None,
) -> str | None:
    """Write to `output` the pairs of a feature store to label next; return a one-line summary.

    `args` has the strategy and its settings; those of the rows, which are in the store, have no
    effect. If there are fewer than `n` pairs, or `rules` leave fewer, those are written.
    `exclude` is the file that some rules came from, which is not overwritten. `preselect_by` is a
    store of cheap rows of the same pool, which choose `args.preselect` pairs per pick first.
    Processes started by a launcher such as torchrun (WORLD_SIZE in the environment) make one
    selection together, each with its part of the rows. The first process writes it, and the others
    return None.

    Raises:
        ActiveDPOError: bad input, no pair to pick, or another process failed; nothing is written
            then.
    """
    started = time.perf_counter()
    args = SelectorConfig() if args is None else args
    _check_stages(args.preselect, preselect_by)
    with launched() as group:
        processes = PoolProcesses(group)

        def prepare() -> tuple[list[FeatureStore], Candidates, torch.Tensor]:
            if processes.rank == 0:
                check_output("--output", output, {"--labeled": labeled, "--exclude": exclude})
                _check_keeps_labels(output)
            paths = [path for path in (store_path, preselect_by) if path is not None]
            return _find_candidates(paths, labeled, rules, processes)

        stores, candidates, asked = processes.check(prepare)
        pool, known = candidates.pool, candidates.labeled
        if group is not None:
            processes.require_same(
                {
                    "store": pool_text(pool, rules) + repr([store.manifest for store in stores]),
                    "--labeled": repr((known.tolist(), asked.tolist())),
                    "rules": repr(rules),
                    "settings": repr((n, args)),
                }
            )
        options: Any = args.strategy_options or {}
        chosen = make_strategy(
            args.strategy,
            offered={**args.offered, "seed": random_seed(args.seed, pool.fingerprint())},
            **options,
        )
        args.warn_of_unused(args.strategy, chosen.options())
        if args.preselect is not None:
            check_preselectable(chosen)
        found = len(candidates.pairs)
        signals = processes.check(
            lambda: _signals(stores, candidates, with_pool="rewards" in chosen.requires)
        )
        picked = run_selection(
            candidates,
            signals,
            chosen,
            n,
            rules=rules,
            preselect=args.preselect,
            group=group,
            chat_template_kwargs=stores[0].manifest["settings"].get("chat_template_kwargs"),
            show_progress=show_progress,
        )
        if processes.rank > 0:
            return None
        _check_scores(picked, found, rules, store_path)
        picked.to_jsonl(output)
    labels = f" and {len(known)} labeled" if len(known) else ""
    return (
        f"{len(picked)} of {found} candidate pairs{labels} picked by {args.strategy}"
        f"{_gain(picked)}: {output} ({time.perf_counter() - started:.1f} s)"
    )


def _check_stages(preselect: int | None, preselect_by: FilePath | None) -> None:
    """Refuse one of the two options without the other."""
    if preselect is not None and preselect_by is None:
        raise ActiveDPOError(
            "--preselect: a store has rows of one kind: name one of cheap rows of the same pool "
            "(--preselect-by), or select with the model, in `activedpo run` or in Python"
        )
    if preselect is None and preselect_by is not None:
        raise ActiveDPOError(
            "--preselect-by: say how many pairs per pick it chooses (--preselect INTEGER)"
        )


def _find_candidates(
    store_paths: Sequence[FilePath],
    labeled: FilePath | None,
    rules: PickRules | None,
    processes: PoolProcesses,
) -> tuple[list[FeatureStore], Candidates, torch.Tensor]:
    """Return the stores, their candidates, and the pairs that were only asked, int64 [n, 2]."""
    stores = [FeatureStore.open(path) for path in store_paths]
    pool = stores[0].pool()
    for path, store in zip(store_paths, stores, strict=True):
        if store.manifest["pool"] != stores[0].manifest["pool"]:
            raise ActiveDPOError(f"{path} has rows of another pool than {store_paths[0]}")
    if len(stores) > 1:
        _check_are_stages(*stores)
    known = asked = torch.empty(0, 2, dtype=torch.int64)
    non_finite = sorted({item for store in stores for item in store.non_finite()})
    skipped = sorted({item for store in stores for item in store.manifest["skipped"]})
    if labeled is not None:
        known, asked = read_labeled_pairs(labeled, pool, log=processes.rank == 0)
        for items, why in (
            (skipped, "are of items that were left out as too long"),
            (non_finite, "have rows that are not finite"),
        ):
            known, asked = _without(known, asked, pool, items, why)
    candidates = Candidates.find(
        pool, processes, labeled=known, asked=asked, skipped=[*skipped, *non_finite], rules=rules
    )
    return stores, candidates, asked


def _check_are_stages(exact: FeatureStore, cheap: FeatureStore) -> None:
    """Raise `ActiveDPOError` unless two stores of a pool can be the stages of one selection."""
    if exact.manifest.get("tokens") != cheap.manifest.get("tokens"):
        raise ActiveDPOError(f"{cheap.path} has rows of other tokens than {exact.path}")
    of_exact, of_cheap = (
        store.manifest.get("filling", {}).get("extractor", {}) for store in (exact, cheap)
    )
    if of_exact.get("weights") != of_cheap.get("weights"):
        raise ActiveDPOError(
            f"{cheap.path} has rows of another model or adapter than {exact.path}: both stages are "
            "of one policy"
        )
    if _has_exact_rows(of_cheap) and not _has_exact_rows(of_exact):
        raise ActiveDPOError(
            f"{exact.path} has cheaper rows than {cheap.path}: --preselect-by takes the cheaper "
            "ones"
        )


def _has_exact_rows(extractor: Mapping[str, Any]) -> bool:
    return extractor.get("gradient") == "all_tokens" and extractor.get("last_layers") is None


def _without(
    known: torch.Tensor, asked: torch.Tensor, pool: PreferencePool, items: Sequence[int], why: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move labeled pairs of items that have no rows to those that were only asked."""
    item = torch.searchsorted(pool.response_offsets, known[:, 0].contiguous(), right=True) - 1
    out = torch.isin(item, torch.tensor(items, dtype=torch.int64))
    if out.any():
        logger.warning("%d labeled pairs %s, and do not enter V", int(out.sum()), why)
    return known[~out], torch.cat([asked, known[out]])


def _signals(
    stores: Sequence[FeatureStore], candidates: Candidates, *, with_pool: bool
) -> TensorSignals:
    """Return the signals of the first store; the second one, if any, has cheap rows."""
    signals: TensorSignals | None = None
    for store in reversed(stores):
        rows, history = _read_rows(store, candidates.part.rows, candidates.labeled)
        signals = TensorSignals(
            candidates.own_pairs,
            candidates.part.item_of_row(candidates.pool),
            gradients=rows,
            history_gradients=history,
            cheap=signals,
            pool=_own_items(candidates) if with_pool else None,
        )
    assert signals is not None
    return signals


def _read_rows(
    store: FeatureStore, own: range, known: torch.Tensor
) -> tuple[torch.Tensor | StoredRows, History]:
    """Return the gradient rows numbered `own`, and those of the labeled pairs `known`."""
    rows = store.rows_on_disk()
    used, pairs = torch.unique(known, return_inverse=True)
    mine = rows.select(torch.arange(own.start, own.stop))
    return _at_hand(mine), (rows.take(used), pairs.view(-1, 2))


def _own_items(candidates: Candidates) -> PreferencePool:
    items = candidates.part.items
    return candidates.pool[items.start : items.stop]


def _at_hand(rows: StoredRows) -> torch.Tensor | StoredRows:
    """Load the rows if they are small enough for memory."""
    return rows.take(torch.arange(len(rows))) if rows.nbytes <= _IN_MEMORY_BYTES else rows


def _check_scores(
    picked: Selection, candidates: int, rules: PickRules | None, store_path: FilePath
) -> None:
    """Refuse an empty selection, and scores that are all 0, except of random picks."""
    if not picked:
        why = (
            f"none of the {candidates} candidate pairs reaches --min-score"
            if candidates
            else "every pair was asked before, or its prompt is too long"
        )
        raise ActiveDPOError(f"{store_path}: no pair is left to pick: {why}")
    if tells_nothing(picked, rules):
        why = (
            "every pair's two responses have the same reward"
            if picked.strategy == "reward_gap"
            else "the gradient rows of each pair are the same or zero: was beta or a weight too "
            "small when they were computed?"
        )
        raise ActiveDPOError(f"{store_path}: all scores are 0, {why}")


def _gain(picked: Selection) -> str:
    """Say what `activedpo` maximizes: det(V + φφᵀ) = det V · (1 + φᵀV⁻¹φ) at each pick."""
    if picked.strategy != "activedpo":
        return ""
    return f", log det V + {sum(math.log1p(pick.score) for pick in picked):.4g}"


def read_rules(
    *, exclude: FilePath | None = None, quotas: Sequence[str] = (), **others: Any
) -> PickRules | None:
    """Return the `PickRules` of the command line; None if it has no rule.

    Args:
        exclude: file with one id per line.
        quotas: "NAME=N" each.
        others: the other fields of `PickRules`.

    Raises:
        ActiveDPOError: names the option or file at fault.
    """
    most: dict[str, int] = {}
    for text in quotas:
        name, equals, number = text.rpartition("=")
        if not (equals and name and number.isascii() and number.isdigit()):
            raise ActiveDPOError(f"--quota {text}: expected NAME=N, N an integer from 0")
        if name in most:
            raise ActiveDPOError(f"--quota {text}: {name!r} has a quota already")
        most[name] = int(number)
    rules = PickRules(exclude=[] if exclude is None else _read_ids(exclude), quotas=most, **others)
    return None if rules == PickRules(seed=rules.seed) else rules


def _read_ids(path: FilePath) -> list[str]:
    """Read the ids of a file with one per line; blank lines are skipped."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def _check_keeps_labels(output: FilePath) -> None:
    """Refuse to overwrite people's labels."""
    target = Path(output)
    if not target.exists():
        return
    try:
        labels = [
            record.get("label") for _, record in jsonl_rows(target) if isinstance(record, Mapping)
        ]
    except ActiveDPOError as error:  # somebody may be editing it
        raise ActiveDPOError(
            f"{output} exists and cannot be read: choose another --output, or "
            f"move it away ({error})"
        ) from None
    count = sum(label is not None for label in labels)
    if count:
        raise ActiveDPOError(
            f"{output} exists and has {count} labels: choose another --output, or move it away"
        )
