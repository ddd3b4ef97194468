"""Responses of a round from the caller's own function, such as one that asks a server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from activedpo_fast._random import forked_rng
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.models.undisturbed import undisturbed
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.template import template_kwargs
from activedpo_fast.pool.texts import Text
from activedpo_fast.training.distinct import distinct_responses
from activedpo_fast.training.recorded import digest
from activedpo_fast.training.sampler import PromptLike


class Generate(Protocol):
    """A function that samples responses, `generate` of `ActiveDPOLoop`.

    Everything is passed by name, and more names may be added: take the rest as `**kwargs`, as
    TRL's reward functions do. As in TRL's `rollout_func`, prompts come as they are, texts or lists
    of messages, each once, and the function applies the chat template.

    Its method `rehearse(prompts, chat_template_kwargs)`, if it has one, is called before a run with
    one or two of the prompts. Its attributes without `_` that are numbers or texts are recorded
    with the run, and compared when it is resumed.

    It has to sample from the current policy at this temperature and `top_p`. That is `model`, whose
    adapter has also been saved to the folder `adapter`. Responses that are empty or repeat another
    one are left out; for what is missing then it is called again, with another seed.

    Args:
        prompts: texts, or lists of chat messages.
        num_generations: how many responses to give to each.
        seed: the same in a run that is resumed.
        adapter: the folder of the policy's adapter, of the start or of the last round, in PEFT's
            format, with the tokenizer. A server needs its absolute path.
        model, processing_class: the policy and its tokenizer, in memory.
        max_completion_length, temperature, top_p: the settings of the loop.
        chat_template_kwargs: arguments of the chat template for each prompt; empty for text.

    Returns:
        For each prompt up to `num_generations` texts. Those to a text are its continuation, with
        the space before the first word; those to messages are the content of the assistant's.
    """

    def __call__(
        self,
        *,
        prompts: list[Text],
        num_generations: int,
        seed: int,
        adapter: Path,
        model: PeftModel,
        processing_class: PreTrainedTokenizerBase,
        max_completion_length: int,
        temperature: float,
        top_p: float,
        chat_template_kwargs: list[dict[str, Any]],
    ) -> Sequence[Sequence[str]]: ...


def check_generate(generate: Any, *, given: bool) -> None:
    """Refuse what is no function, or one that nothing is asked of.

    Args:
        given: the responses are given, so that none are sampled.
    """
    if generate is None:
        return
    if not callable(generate):
        raise ActiveDPOError(f"generate: expected a function, got {type(generate).__name__}")
    if given:
        raise ActiveDPOError(
            "generate: with responses 'given' no response is sampled: leave it out"
        )


def rehearse_generate(
    generate: Any, prompts: Sequence[PromptLike], common: Mapping[str, Any] | None
) -> None:
    """Call its method `rehearse`, if it has one, with some of the prompts."""
    if callable(rehearse := getattr(generate, "rehearse", None)):
        rehearse([p.prompt for p in prompts], [_template_kwargs(p, common) for p in prompts])


def _template_kwargs(prompt: PromptLike, common: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if isinstance(prompt.prompt, str) else template_kwargs(prompt.extra, common)


def generated_responses(
    generate: Generate,
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[PromptLike],
    *,
    adapter: Path,
    seed: int,
    sampling: Mapping[str, Any],
    common_template_kwargs: Mapping[str, Any] | None,
) -> PreferencePool:
    """Return what `generate_responses` would, with responses from `generate`.

    The model, the tokenizer's settings aside, and the global random generators are restored.

    Args:
        sampling: the settings of the loop.
        common_template_kwargs: arguments of the chat template; a prompt's own take precedence.

    Raises:
        ActiveDPOError: `generate` does not give lists of texts as it should; no prompt with enough
            distinct responses. What `generate` raises is passed on.
    """

    def sample(missing: list[int], attempt: int) -> Iterator[tuple[int, str]]:
        counts = Counter(missing)
        for count in sorted(set(counts.values()), reverse=True):
            positions = [position for position in counts if counts[position] == count]
            found = ask(
                generate,
                model,
                processing_class,
                [prompts[position] for position in positions],
                count,
                adapter=adapter,
                seed=int(digest([seed, attempt, count])[:12], 16),
                sampling=sampling,
                common_template_kwargs=common_template_kwargs,
            )
            for position, responses in zip(positions, found, strict=True):
                yield from ((position, response) for response in responses)

    return distinct_responses(
        prompts,
        sample,
        num_generations=sampling["num_generations"],
        max_attempts=sampling["max_attempts"],
    )


def ask(
    generate: Generate,
    model: PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[PromptLike],
    num_generations: int,
    *,
    adapter: Path,
    seed: int,
    sampling: Mapping[str, Any],
    common_template_kwargs: Mapping[str, Any] | None,
) -> Sequence[Sequence[str]]:
    """Return what one call of `generate` gives, checked; see `generated_responses`."""
    with undisturbed(model), forked_rng(model.device, seed):
        found = generate(
            prompts=[prompt.prompt for prompt in prompts],
            num_generations=num_generations,
            seed=seed,
            adapter=adapter,
            model=model,
            processing_class=processing_class,
            max_completion_length=sampling["max_completion_length"],
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            chat_template_kwargs=[
                _template_kwargs(prompt, common_template_kwargs) for prompt in prompts
            ],
        )
    _check(found, len(prompts), num_generations)
    return found


def _check(found: Any, prompts: int, count: int) -> None:
    """Refuse what is not a list of texts for each prompt."""
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != prompts:
        size = f" of {len(found)}" if isinstance(found, Sequence) else ""
        raise ActiveDPOError(
            f"generate: expected a list of responses for each of {prompts} prompts, got "
            f"{type(found).__name__}{size}"
        )
    for responses in found:
        if isinstance(responses, str) or not isinstance(responses, Sequence):
            raise ActiveDPOError(
                "generate: expected a list of responses for each prompt, got "
                f"{type(responses).__name__} for one"
            )
        if len(responses) > count:
            raise ActiveDPOError(
                f"generate: {len(responses)} responses to a prompt, {count} were asked for"
            )
        for response in responses:
            if not isinstance(response, str):
                raise ActiveDPOError(
                    f"generate: expected texts as responses, got {type(response).__name__}"
                )
