"""Sampling responses from the model in training, and single ones for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.models.named import GivenModel
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokenizers import leaves_tokenizer
from activedpo_fast.settings import check_responding, check_sampling
from activedpo_fast.training.distinct import distinct_responses
from activedpo_fast.training.sampler import PromptLike, Sampler

if TYPE_CHECKING:
    import datasets
    import torch.distributed as dist


@leaves_tokenizer(1)
def generate_responses(
    model: GivenModel,
    processing_class: PreTrainedTokenizerBase | None,
    prompts: Sequence[PromptLike] | datasets.Dataset,
    *,
    num_generations: int = 2,
    max_completion_length: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    generation_batch_size: int = 16,
    max_attempts: int = 4,
    chat_template_kwargs: dict[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    show_progress: bool | None = None,
) -> PreferencePool:
    """Sample `num_generations` distinct responses to each prompt from π_θ.

    The distribution is the model's own at `temperature`, truncated to `top_p`. Other settings of
    the model's generation config (top-k, repetition penalty and so on) are not applied. A response
    ends at the tokenizer's or the model's EOS token or after `max_completion_length`. Plain-text
    responses keep a leading space, so that prompt + response is the text that the model wrote. Chat
    responses are one assistant message, without surrounding white space.

    Responses that are empty, or differ only in surrounding white space from another one to the same
    prompt, are sampled again, in up to `max_attempts` rounds in total. Prompts that still have too
    few are left out; one warning gives their number.

    The same model, arguments and machine give the same responses. The state of the global random
    generators, the model's modes and flags, and the tokenizer are restored afterward.

    Args:
        model: also by name, as in `ActiveDPOSelector`; it is then loaded for this call.
        processing_class: None for that of a model given by name.
        prompts: `Prompt`s, a `PreferencePool`, or a `datasets.Dataset` with a column `prompt` and
            no responses. The result keeps their ids and extra columns.
        generation_batch_size: sequences generated at once.
        chat_template_kwargs: passed to the chat template, as in `tokenize_pool`; give the same as
            to the selector. Those in a prompt's own column of this name take precedence.
        group: processes that share the batches, as in `ActiveDPOSelector.select`. Each has the same
            model and calls this with the same arguments, and all get the responses of one process
            (given the same kind of GPU, or the same number of CPU threads).
        show_progress: None shows a bar on a terminal only.

    Raises:
        ActiveDPOError: no prompts, a malformed prompt or option, no usable tokenizer, a prompt that
            with `max_completion_length` exceeds the model's positions (if they are limited; rotary
            positions are not, and only give a warning), token ids that the model lacks, or no
            prompt with enough responses.

    Examples:
        >>> from activedpo_fast import generate_responses
        >>> pool = generate_responses(
        ...     model, tokenizer, prompts, num_generations=3, max_completion_length=16)
        >>> pool
        PreferencePool(4 prompts, 12 responses)
    """
    check_sampling(
        num_generations=num_generations,
        max_completion_length=max_completion_length,
        temperature=temperature,
        top_p=top_p,
        generation_batch_size=generation_batch_size,
        max_attempts=max_attempts,
    )
    processes = PoolProcesses(group, "nothing was generated")
    sampler = processes.check(
        lambda: Sampler(
            model,
            processing_class,
            prompts,
            max_completion_length,
            generation_batch_size,
            chat_template_kwargs or {},
        )
    )
    if processes.rank > 0:
        show_progress = False

    def sample(missing: list[int], attempt: int) -> Iterator[tuple[int, str]]:
        description = "generate" if attempt == 1 else f"generate, attempt {attempt}"
        texts = sampler.run(
            missing,
            description,
            show_progress,
            seed=[int(seed), attempt],
            processes=processes,
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
        )
        return zip(missing, texts, strict=True)

    return distinct_responses(
        sampler.prompts, sample, num_generations=num_generations, max_attempts=max_attempts
    )


@leaves_tokenizer(1)
def shortest_prompts(
    model: GivenModel,
    processing_class: PreTrainedTokenizerBase | None,
    prompts: Sequence[PromptLike],
    max_completion_length: int,
    chat_template_kwargs: dict[str, Any] | None,
) -> list[int]:
    """Encode all prompts; return the positions of the two with the fewest tokens, or of the one.

    Raises:
        ActiveDPOError: a prompt that `generate_responses` would refuse.
    """
    kwargs = chat_template_kwargs or {}
    sampler = Sampler(model, processing_class, prompts, max_completion_length, 1, kwargs)
    return sorted(range(len(prompts)), key=lambda n: len(sampler.prompt_ids[n]))[:2]


@leaves_tokenizer(1)
def respond(
    model: GivenModel,
    processing_class: PreTrainedTokenizerBase | None,
    prompts: Sequence[PromptLike] | datasets.Dataset,
    *,
    max_completion_length: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    generation_batch_size: int = 16,
    chat_template_kwargs: dict[str, Any] | None = None,
    show_progress: bool | None = None,
) -> list[str]:
    """Return one text per prompt, in order, possibly empty, to evaluate a model.

    `temperature` 0 takes the most likely token at each step; above 0, tokens are sampled from the
    model's distribution, truncated to `top_p`. Arguments, texts, errors and restored state are as
    in `generate_responses`; chat responses are only the message's content.
    """
    check_responding(temperature=temperature, top_p=top_p)
    sampler = Sampler(
        model,
        processing_class,
        prompts,
        max_completion_length,
        generation_batch_size,
        chat_template_kwargs or {},
    )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    everyone = range(len(sampler.prompts))
    return sampler.run(everyone, "respond", show_progress, seed=[int(seed)], **sampling)
