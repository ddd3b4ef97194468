"""Continuing prompts with a model, in batches: what is sampled, not what becomes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from activedpo_fast._checks import check_at_least
from activedpo_fast._random import forked_rng
from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.supported import known_tokens, position_limit, require_supported
from activedpo_fast.models.adapters import causal_lm
from activedpo_fast.models.encoder_decoder import refuse_encoder_decoder
from activedpo_fast.models.named import GivenModel, as_model
from activedpo_fast.models.undisturbed import undisturbed
from activedpo_fast.pool.items import check_prompts
from activedpo_fast.pool.reading import as_prompts
from activedpo_fast.pool.template import check_template_kwargs, template_kwargs
from activedpo_fast.pool.texts import Text
from activedpo_fast.pool.tokens import check_tokenizer, encode_chat
from activedpo_fast.progress import progress_bar
from activedpo_fast.training.recorded import digest

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class PromptLike(Protocol):
    """A `Prompt` or `PoolItem`; existing responses are ignored."""

    @property
    def id(self) -> str: ...
    @property
    def prompt(self) -> Text: ...
    @property
    def extra(self) -> dict[str, Any]: ...


class Sampler:
    """Encoded prompts, and the batches that continue them.

    Args:
        common: arguments of the chat template; a prompt's own take precedence.
    """

    def __init__(
        self,
        model: GivenModel,
        tokenizer: PreTrainedTokenizerBase | None,
        prompts: Sequence[PromptLike] | datasets.Dataset,
        max_completion_length: int,
        generation_batch_size: int,
        common: Mapping[str, Any],
    ) -> None:
        check_at_least(
            1,
            max_completion_length=max_completion_length,
            generation_batch_size=generation_batch_size,
        )
        prompts = self.prompts = as_prompts(prompts)
        check_prompts(prompts)
        check_template_kwargs(common)
        self.chat = not isinstance(prompts[0].prompt, str)
        self.model, self.tokenizer = as_model(model, tokenizer)
        check_tokenizer(self.tokenizer, chat=self.chat)
        pad = self.tokenizer.pad_token_id
        require_supported(self.model, pad_token_id=0 if pad is None else pad)
        refuse_encoder_decoder(self.model, "whose responses are not sampled here")
        # The model whose `generate` and generation config are used.
        self.owner = cast(PreTrainedModel, causal_lm(self.model))
        self.max_completion_length = max_completion_length
        self.generation_batch_size = generation_batch_size
        self.device: torch.device = self.model.get_input_embeddings().weight.device
        self.eos_ids = _eos_ids(self.model, self.tokenizer)
        if self.chat:
            self.prompt_ids = [
                encode_chat(
                    self.tokenizer,
                    list(prompt.prompt),
                    prompt.id,
                    add_generation_prompt=True,
                    **template_kwargs(prompt.extra, common),
                )
                for prompt in prompts
            ]
        else:
            self.prompt_ids = self._encode_plain([str(prompt.prompt) for prompt in prompts])
        self._check_lengths(prompts)

    def run(
        self,
        positions: Sequence[int],
        description: str,
        show_progress: bool | None,
        *,
        seed: list[int],
        processes: PoolProcesses | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Return one continuation for each of `positions` (a prompt may occur several times).

        Args:
            seed: of this call. Each batch has a seed of its own, so that it is the same whichever
                batches came before.
            processes: share the batches, and all get all continuations.
        """
        processes = processes or PoolProcesses(None)
        # Longest first: little padding, and running out of memory shows at once.
        order = sorted(range(len(positions)), key=lambda n: -len(self.prompt_ids[positions[n]]))
        size = self.generation_batch_size
        batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
        mine = list(enumerate(batches))[processes.rank :: processes.size]

        def sample() -> list[str]:
            return self._run(positions, mine, description, show_progress, seed, sampling)

        found = processes.texts_of_all(processes.check(sample))
        texts = [""] * len(positions)
        for rank, own in enumerate(found):
            numbers = (n for batch in batches[rank :: processes.size] for n in batch)
            for n, text in zip(numbers, own, strict=True):
                texts[n] = text
        return texts

    def _run(
        self,
        positions: Sequence[int],
        batches: Sequence[tuple[int, list[int]]],
        description: str,
        show_progress: bool | None,
        seed: list[int],
        sampling: dict[str, Any],
    ) -> list[str]:
        """Return the continuations of some numbered batches, which have places in `positions`."""
        texts = []
        total = sum(len(batch) for _, batch in batches)
        with (
            undisturbed(self.model),
            torch.no_grad(),
            self._plain_generation_config(),
            progress_bar(show_progress, total=total, desc=description, unit="response") as bar,
        ):
            for number, batch in batches:
                rows = [self.prompt_ids[positions[n]] for n in batch]
                with forked_rng(self.device, int(digest([*seed, number])[:12], 16)):
                    continuations = self._continue(rows, sampling)
                texts += [
                    self._decode(row, new) for row, new in zip(rows, continuations, strict=True)
                ]
                bar.update(len(batch))
        return texts

    def _continue(self, rows: Sequence[list[int]], sampling: dict[str, Any]) -> list[list[int]]:
        """Return the new token ids of each row, up to and without the first EOS."""
        # Pad on the left here, independent of the tokenizer's padding settings.
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else min(self.eos_ids, default=0)
        ids = torch.full((len(rows), length), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(rows):
            ids[n, length - len(row) :] = torch.tensor(row)
            mask[n, length - len(row) :] = 1
        config = GenerationConfig(
            max_new_tokens=self.max_completion_length,
            num_beams=1,
            use_cache=True,
            eos_token_id=self.eos_ids or None,
            pad_token_id=pad,
            **sampling,
        )
        output = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=config,
        )
        continuations = []
        for new in output[:, length:].tolist():
            end = next((n for n, token in enumerate(new) if token in self.eos_ids), len(new))
            continuations.append(new[:end])
        return continuations

    def _decode(self, prompt: list[int], new: list[int]) -> str:
        if self.chat:
            return self._to_text(new).strip()
        # SentencePiece tokenizers drop the space before a text's first word, so decode the
        # continuation together with its prompt.
        before, whole = self._to_text(prompt), self._to_text(prompt + new)
        return whole[len(before) :] if whole.startswith(before) else self._to_text(new)

    def _to_text(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        encoded = [list(ids) for ids in self.tokenizer(text=texts)["input_ids"]]
        eos = self.tokenizer.eos_token_id
        for text, ids in zip(texts, encoded, strict=True):
            # Some tokenizers end every text with EOS, which leaves nothing to continue.
            if ids and ids[-1] == eos and not text.endswith(str(self.tokenizer.eos_token)):
                ids.pop()
        return encoded

    def _check_lengths(self, prompts: Sequence[PromptLike]) -> None:
        limit, known = position_limit(self.owner), known_tokens(self.owner)
        for prompt, ids in zip(prompts, self.prompt_ids, strict=True):
            if not ids:
                raise ActiveDPOError(f"item {prompt.id!r}: the prompt has no tokens")
            if known is not None and not 0 <= min(ids) <= max(ids) < known:
                raise ActiveDPOError(
                    f"item {prompt.id!r}: the prompt has the token id {max(ids)}, "
                    f"and the model has embeddings for {known} tokens: is this "
                    "the model's tokenizer?"
                )
            if limit is not None and len(ids) + self.max_completion_length > limit:
                raise ActiveDPOError(
                    f"item {prompt.id!r}: {len(ids)} prompt tokens and "
                    f"max_completion_length={self.max_completion_length} exceed the model's "
                    f"{limit} positions"
                )
        # Rotary positions have no limit; the length the model was trained with is only advice.
        trained = getattr(self.owner.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, self.prompt_ids)) + self.max_completion_length
        if limit is None and trained is not None and longest > trained:
            logger.warning(
                "up to %d tokens with max_completion_length=%d: the model was made for %d",
                longest,
                self.max_completion_length,
                trained,
            )

    @contextmanager
    def _plain_generation_config(self) -> Iterator[None]:
        """Hide the model's own generation config: `generate` would fill in what we leave out.

        A PEFT model's `generate` copies a generation config that was set on it to the inner model,
        and leaves a method there.
        """
        places = [
            vars(place)
            for place in {
                id(place): place
                for place in (self.model, getattr(self.model, "base_model", self.model), self.owner)
            }.values()
        ]
        names = ("generation_config", "prepare_inputs_for_generation")
        before = [{name: own[name] for name in names if name in own} for own in places]
        for own in places:
            if "generation_config" in own:
                own["generation_config"] = GenerationConfig()
        try:
            yield
        finally:
            for own, values in zip(places, before, strict=True):
                for name in names:
                    own.pop(name, None)
                own.update(values)


def _eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured])
    return sorted(id for id in ids | {tokenizer.eos_token_id} if id is not None)
