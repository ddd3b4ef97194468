"""`ActiveDPOSelector`: given a model and a pool, pick the pairs to label next."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from activedpo_fast._modes import in_own_modes
from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.gradients.supported import require_supported
from activedpo_fast.gradients.trainable import trainable_parameters
from activedpo_fast.models.adapters import active_adapters
from activedpo_fast.models.encoder_decoder import decoder_start_token_id
from activedpo_fast.models.named import GivenModel, as_model, is_name
from activedpo_fast.models.ref_model import RefModel, check_ref_model
from activedpo_fast.pool.pool import PreferencePool, as_pool
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from activedpo_fast.pool.vision import ProcessingClass
from activedpo_fast.presets import preset as find_preset
from activedpo_fast.selection.candidates import Candidates, pool_text, split_history
from activedpo_fast.selection.model_signals import ModelSignals
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.preselection import check_preselectable
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.rules import PickRules, check_is_rules, random_seed
from activedpo_fast.selection.run import run_selection, tells_nothing
from activedpo_fast.selection.strategies import Strategy, make_strategy
from activedpo_fast.settings import SelectorConfig, read_settings

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Labeled = Selection | Sequence[Selection]

MODEL_SIGNALS = frozenset({"gradients", "hidden", "logps", "ref_logps"})
NO_TOKENS = TokenizedPool([], [])


class ActiveDPOSelector:
    """Choose the pairs of a pool whose labels are most informative for the model in training.

    Every call to `select` uses the model's current weights and leaves the model unchanged. A model
    that was given by name is `selector.model` then, and its tokenizer `selector.processing_class`.

    Args:
        model: the policy π_θ, a causal or encoder-decoder LM (usually with PEFT LoRA). A
            string or path is loaded as `activedpo features` loads it: the folder or hub name of an
            adapter (on the base model that it names), or of a model, which is frozen then and
            serves the strategies that need no gradients.
        processing_class: its tokenizer; may be left out for a model given by name. For a pool with
            images, the processor of the vision-language model.
        args: the settings. Or give them as keyword options, by the names of `SelectorConfig`:
            `ActiveDPOSelector(model, tokenizer, normalize="pair", seed=1)`. β, the lengths and
            `length_normalized` have to be those of training: `selector_settings` reads them from a
            DPOConfig.
        strategy: the name of one, a setting like the others, or a `Strategy`. A `Strategy` has
            options of its own: lam, kappa, normalize and strategy_options are refused with it, seed
            is for the sketch alone, and beta for the gradient rows.
        preset: "paper" uses the settings of arXiv 2505.19241; options given here override it.
        ref_model: π_ref for the strategies that need it (aplp, margin_small, margin_large,
            adpo_plus, trace_plus): a model, the name of an adapter of `model`, or the weights of
            its adapter as returned by `activedpo_fast.models.adapters.adapter_state`. Default: the
            adapter "ref" of a PEFT model that has one (DPOTrainer creates it), else the base model
            with all adapters disabled. If DPO continues from an adapter trained by SFT,
            DPOTrainer's reference is that adapter: without "ref", pass its weights.
        peft_config: puts a fresh adapter on a model without one, as `DPOTrainer` does; its random
            weights depend on the setting `seed`. The PEFT model is `selector.model`.
        options: the fields of `SelectorConfig`.

    Raises:
        ActiveDPOError: an option is unknown or out of range, or given beside `args`; the model or
            the reference model is of an unsupported kind, or the strategy needs a reference and
            there is none; a model cannot be loaded by its name, or has nothing to train and the
            strategy needs gradients; a model in memory without its tokenizer.

    Source: Lin et al., ActiveDPO, arXiv 2505.19241; see docs/method.md.

    Examples:
        >>> from activedpo_fast import ActiveDPOSelector
        >>> selector = ActiveDPOSelector(model, processing_class=tokenizer)
        >>> picked = selector.select(pool, 4)
        >>> train_dataset = picked.to_dataset(labels)  # for trl.DPOTrainer
        >>> train_dataset.column_names
        ['id', 'prompt', 'chosen', 'rejected']

        An adapter by name, and a data set:

        >>> import datasets
        >>> dataset = datasets.Dataset.from_list([
        ...     {"prompt": "Name a color.", "responses": [" Red.", " Pale blue.", " Dog."]},
        ...     {"prompt": "Name an animal.", "responses": [" A dog.", " Red."]}])
        >>> selector = ActiveDPOSelector("adapter")
        >>> len(selector.select(dataset, 2))
        2
        >>> model, tokenizer = selector.model, selector.processing_class
    """

    def __init__(
        self,
        model: GivenModel,
        processing_class: ProcessingClass | None = None,
        *,
        args: SelectorConfig | None = None,
        strategy: str | Strategy | None = None,
        preset: str | None = None,
        ref_model: RefModel | None = None,
        peft_config: PeftConfig | None = None,
        **options: Any,
    ) -> None:
        if preset is not None and args is not None:
            raise ActiveDPOError(
                "preset: settings are given twice, in args too; let the preset make them "
                "(activedpo_fast.presets.preset(name).selector_config)"
            )
        if preset is not None:
            named = {"strategy": strategy} if isinstance(strategy, str) else {}
            options = find_preset(preset).selector_options({**options, **named})
            strategy = options.pop("strategy") if not isinstance(strategy, Strategy) else strategy
        self.args, self.strategy = read_settings(SelectorConfig, args, options, strategy)
        if not isinstance(self.strategy, str):
            _refuse_its_options(self.args)
        self.ref_model = ref_model
        config = self.args
        projection = Sketch(config.sketch, config.proj_dim, config.seed)
        # Report an unknown name or option, or an unsupported model, now rather than after an hour.
        chosen = self._make_strategy("")
        if isinstance(self.strategy, str):
            self.args.warn_of_unused(self.strategy, type(chosen).options())
        requires = getattr(chosen, "requires", ())
        if config.preselect is not None:
            check_preselectable(chosen)
        self.model, self.processing_class = as_model(
            model, processing_class, peft_config=peft_config, seed=config.seed
        )
        check_ref_model(self.model, ref_model)
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        pad_token_id = tokenizer.pad_token_id
        self.extractor = FeatureExtractor(
            self.model,
            projection,
            beta=config.beta,
            length_normalized=config.length_normalized,
            gradient=config.gradient,
            last_layers=config.last_layers if config.preselect is None else None,
            pad_token_id=0 if pad_token_id is None else pad_token_id,
            max_tokens_per_batch=config.max_tokens_per_batch,
            precision="bf16" if config.bf16 else None,
            verify=config.verify,
        )
        if config.preselect is not None:
            self.extractor.of_response_tokens(config.last_layers)  # refuses too many
        self.last_timings: dict[str, float] = {}
        self._check_model(requires, named=is_name(model))

    def _check_model(self, requires: Collection[str], *, named: bool) -> None:
        """Refuse models that cannot give the signals which the strategy requires."""
        pad_token_id = self.extractor.pad_token_id
        gradients = "gradients" in requires
        require_supported(self.model, gradients=gradients, pad_token_id=pad_token_id)
        check_ref_model(self.model, self.ref_model, needed="ref_logps" in requires)
        if gradients and not (named or active_adapters(self.model)):
            logger.info(
                "the model has no adapter: rows are gradients of all that it trains; if the "
                "trainer gets a peft_config, pass it here, too"
            )
        if gradients and named:
            # The flags of a model in memory may still change.
            trainable_parameters(self.model, self.args.last_layers)
        if isinstance(self.ref_model, torch.nn.Module):
            require_supported(self.ref_model, pad_token_id=pad_token_id)

    @in_own_modes
    def select(
        self,
        pool: PreferencePool | datasets.Dataset,
        n: int,
        *,
        labeled: Labeled | None = None,
        asked: Labeled | None = None,
        rules: PickRules | None = None,
        group: dist.ProcessGroup | None = None,
        show_progress: bool | None = None,
    ) -> Selection:
        """Choose up to `n` pairs of `pool`, best first.

        Args:
            pool: prompts with two or more responses each, as a pool or as a `datasets.Dataset` with
                the columns of one (see `PreferencePool`).
            n: the number of pairs. If there are fewer, or the rules leave fewer, all of those are
                picked, and this is logged; the selection is empty if there are none.
            labeled: the pairs that have a preference: one or more earlier `Selection`s (see
                `by_preference`; pairs without a preference are `asked`). Their features are
                recomputed at the model's current weights, with the selector's own
                `chat_template_kwargs`, and enter V. If the picks have different
                `chat_template_kwargs`, this is logged. A pair of `pool` that is among them is not
                a candidate. Two pairs are the same if the prompt (see `PickRules.prompt_by`) and
                the two responses are the same, in either order and under any id.
            asked: pairs that were asked before and have no preference: out for labeling, or
                answered by "skip". They are not candidates either, and do not enter V. See
                `by_preference` and `read_pending`.
            rules: further constraints on the picks.
            group: the processes that select together: pass `torch.distributed.group.WORLD` under
                torchrun or `accelerate launch`. Each has the same model (not wrapped in DDP; pass
                DDP's `.module`) and calls `select` with the same arguments. Each computes the
                features of its own part of the pool and of the labeled pairs, and all return the
                selection that one process would. They wait for the slowest, so the group's timeout
                has to be longer than the features of one part may take. Default: this process
                selects alone. Under torchrun, every process then does all of the work.
            show_progress: True, False, or None for a bar on terminals only. In a group, only the
                first process shows it.

        Returns:
            The picks. `last_timings` then has the seconds spent in "features" and in "select".

        Raises:
            ActiveDPOError: n is not an integer from 0; rules that do not fit the pool or leave no
                candidate; an unsupported pool or model; another process of the group failed, was
                lost, or has different arguments, settings or weights. All processes raise in that
                case.
        """
        check_is_rules(rules)
        processes = PoolProcesses(group)
        pool = processes.check(lambda: as_pool(pool))
        started = time.perf_counter()
        history, undecided = _picks_of(labeled, "labeled"), _picks_of(asked, "asked")
        template = self.args.tokenization["chat_template_kwargs"]
        if processes.rank == 0:
            _tell_of_other_arguments(history, template)
        else:
            show_progress = False
        strategy = self._make_strategy(pool.fingerprint())
        if group is not None:
            self._require_same(processes, pool, n, history, undecided, rules, strategy)
        part = processes.part(pool)
        tokens = processes.check(
            lambda: (
                NO_TOKENS
                if self._needs_no_tokens(pool, strategy)
                else self._tokenize(
                    pool[part.items.start : part.items.stop], pool.has_images, show_progress
                )
            )
        )
        tokenized = time.perf_counter() - started
        skipped = torch.tensor(tokens.skipped, dtype=torch.int64) + part.items.start
        in_pool, elsewhere = split_history(pool, history)
        candidates = Candidates.find(
            pool,
            processes,
            labeled=in_pool,
            asked=split_history(pool, undecided)[0],
            skipped=processes.gather(skipped).tolist(),
            rules=rules,
        )
        signals = ModelSignals(
            self.extractor,
            self.extractor.of_response_tokens(self.args.last_layers),
            candidates,
            tokens,
            elsewhere,
            self.tokenize,
            self.ref_model,
            processes,
            show_progress,
        )
        picked = run_selection(
            candidates,
            signals,
            strategy,
            n,
            rules=rules,
            preselect=self.args.preselect,
            chat_template_kwargs=template,
            group=group,
            show_progress=show_progress,
        )
        if tells_nothing(picked, rules):
            logger.warning(
                "all scores are 0, so %s tells no pair from another: are the two responses of "
                "every pair the same tokens?",
                picked.strategy,
            )
        features = tokenized + signals.seconds
        self.last_timings = {
            "features": features,
            "select": time.perf_counter() - started - features,
        }
        return picked

    def tokenize(
        self, pool: PreferencePool | datasets.Dataset, *, show_progress: bool | None = None
    ) -> TokenizedPool:
        """Return the tokens that features are computed on, which are those DPOTrainer trains on."""
        return self._tokenize(pool, None, show_progress)

    def _tokenize(
        self,
        pool: PreferencePool | datasets.Dataset,
        with_images: bool | None,
        show_progress: bool | None,
    ) -> TokenizedPool:
        return tokenize_pool(
            pool,
            self.processing_class,
            with_images=with_images,
            decoder_start_token_id=decoder_start_token_id(self.model, self.processing_class),
            show_progress=show_progress,
            **self.args.tokenization,
        )

    def _needs_no_tokens(self, pool: PreferencePool, strategy: Strategy) -> bool:
        """Return whether images need not be read: by a strategy that does not use the model, where
        only a tokenizer is given."""
        by_model = getattr(strategy, "requires", MODEL_SIGNALS) & MODEL_SIGNALS
        has_processor = isinstance(self.processing_class, ProcessorMixin)
        return not by_model and not has_processor and pool.has_images

    def _make_strategy(self, pool_fingerprint: str) -> Strategy:
        if isinstance(self.strategy, Strategy):
            return self.strategy
        offered = {**self.args.offered, "seed": random_seed(self.args.seed, pool_fingerprint)}
        options: Any = self.args.strategy_options or {}
        return make_strategy(self.strategy, offered=offered, **options)

    def _require_same(
        self,
        processes: PoolProcesses,
        pool: PreferencePool,
        n: int,
        history: list[Pick],
        undecided: list[Pick],
        rules: PickRules | None,
        strategy: Strategy,
    ) -> None:
        """Raise `ActiveDPOError` unless all processes were given the same input."""
        options = {
            name: value
            for name, value in vars(strategy).items()
            if isinstance(value, (str, int, float, type(None)))
        }
        extractor = self.extractor
        processes.require_same(
            {
                "pool": pool_text(pool, rules),
                "n": repr(n),
                "labeled": repr(
                    [
                        (pick.id, pick.prompt, pick.responses, pick.item_chat_template_kwargs)
                        for pick in history
                    ]
                ),
                "asked": repr(
                    [
                        (pick.id, pick.prompt, pick.responses, pick.item_chat_template_kwargs)
                        for pick in undecided
                    ]
                ),
                "rules": repr(rules),
                "strategy": repr((strategy.name, sorted(options.items()))),
                "sketch": repr(extractor.sketch),
                "beta or precision": repr((extractor.beta, extractor.precision)),
                "length_normalized": repr(extractor.length_normalized),
                "gradient": repr(extractor.gradient),
                "last_layers": repr(self.args.last_layers),
                "preselect": repr(self.args.preselect),
                "ref_model": (
                    repr(self.ref_model)
                    if isinstance(self.ref_model, str)
                    else type(self.ref_model).__name__
                ),
                "tokenization": repr(sorted(self.args.tokenization.items())),
            },
            {"norm of the trainable weights": _norm(self.model)},
        )


def _tell_of_other_arguments(history: Sequence[Pick], common: Mapping[str, Any] | None) -> None:
    """Log how many labeled chat pairs were picked with different chat template arguments."""
    other = sum(
        (pick.chat_template_kwargs or {})
        != {**(common or {}), **(pick.item_chat_template_kwargs or {})}
        for pick in history
        if not isinstance(pick.prompt, str)
    )
    if other:
        logger.warning(
            "%d of %d labeled pairs were picked with other chat_template_kwargs: their "
            "features use the selector's; their to_dataset keeps their own",
            other,
            len(history),
        )


def _norm(model: PreTrainedModel | PeftModel) -> float:
    """Return the norm of all trainable weights together."""
    norms = [
        torch.linalg.vector_norm(p.detach(), dtype=torch.float64).cpu()
        for p in model.parameters()
        if p.requires_grad
    ]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _picks_of(given: Labeled | None, name: str) -> list[Pick]:
    """Return the picks of all selections in a row."""
    if given is None:
        return []
    listed = [given] if isinstance(given, (Selection, str)) else given
    picks: list[Pick] = []
    for entry in listed if isinstance(listed, Iterable) else [listed]:
        if not isinstance(entry, Selection):
            raise ActiveDPOError(
                f"{name}: expected a Selection, or several, got {type(entry).__name__}; "
                "read_labels reads them from a file, and by_preference splits them by their labels"
            )
        picks += entry
    return picks


def _refuse_its_options(args: SelectorConfig) -> None:
    """Raise if an option of a named strategy was given beside a `Strategy` object."""
    usual = SelectorConfig()
    names = ("normalize", "lam", "kappa", "strategy_options")
    given = [
        name for name in names if (getattr(args, name) or None) != (getattr(usual, name) or None)
    ]
    if given:
        raise ActiveDPOError(
            f"{', '.join(given)} would have no effect on a Strategy object; give it to the "
            "object's own constructor, or name the strategy"
        )
