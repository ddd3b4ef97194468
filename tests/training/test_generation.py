"""Sampled responses are distinct and reproducible, and the model and the tokenizer are left
unchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.items import Prompt
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.training.generation import generate_responses, respond
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

PROMPTS = [
    Prompt(f"p{n}", text, {"reference": n})
    for n, text in enumerate(
        ["The quick", "What is a sketch? ", "A", "people prefer one of them " * 4, "TL;DR:"]
    )
]
CHATS = [Prompt(prompt.id, [{"role": "user", "content": str(prompt.prompt)}]) for prompt in PROMPTS]


def _model(arch: str = "llama") -> Any:
    return lora(tiny_causal_lm(arch), arch)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_responses_are_distinct_and_keep_their_prompts(arch: str) -> None:
    pool = generate_responses(
        _model(arch),
        tiny_tokenizer(),
        PROMPTS,
        num_generations=3,
        max_completion_length=6,
        generation_batch_size=4,
    )
    assert isinstance(pool, PreferencePool)
    assert pool.ids == [prompt.id for prompt in PROMPTS]
    for item, prompt in zip(pool, PROMPTS, strict=True):
        assert item.prompt == prompt.prompt
        assert item.extra == prompt.extra
        assert len({str(response).strip() for response in item.responses} - {""}) == 3


def test_chat_responses_are_one_assistant_message() -> None:
    pool = generate_responses(_model(), tiny_tokenizer(chat=True), CHATS, max_completion_length=6)
    assert pool.is_chat
    for item in pool:
        for response in item.responses:
            assert [message["role"] for message in response] == ["assistant"]  # type: ignore
            content = response[0]["content"]  # type: ignore
            assert content and content == content.strip() and "<|im_" not in content


def test_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model, tokenizer = _model(), tiny_tokenizer()

    def sample(seed: int) -> list[Any]:
        return list(
            generate_responses(model, tokenizer, PROMPTS, max_completion_length=8, seed=seed)
        )

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sample(1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(77)
    assert sample(1) == first
    assert sample(2) != first


def test_greedy_does_not_depend_on_batches_or_padding_side() -> None:
    """Each prompt alone, all in one batch, and a step-by-step argmax agree."""
    model = _model()
    tokenizer = tiny_tokenizer(padding_side="right")
    together = respond(model, tokenizer, PROMPTS, max_completion_length=7, generation_batch_size=5)
    alone = [respond(model, tokenizer, [prompt], max_completion_length=7)[0] for prompt in PROMPTS]
    assert together == alone
    for prompt, text in zip(PROMPTS, together, strict=True):
        start = tokenizer(str(prompt.prompt))["input_ids"]
        ids = list(start)
        for _ in range(7):
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        assert text == tokenizer.decode(ids[len(start) :], skip_special_tokens=True)


def test_model_and_tokenizer_are_left_as_they_were() -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    model.train()
    model.base_model.model.lm_head.eval()
    model.config.use_cache = False
    own = model.get_base_model().generation_config
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    generate_responses(model, tokenizer, PROMPTS, max_completion_length=4)
    with pytest.raises(RuntimeError, match="stop here"):

        def stop(*_: Any) -> None:
            raise RuntimeError("stop here")

        handle = model.base_model.model.lm_head.register_forward_hook(stop)
        try:
            respond(model, tokenizer, PROMPTS, max_completion_length=4)
        finally:
            handle.remove()
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.get_base_model().generation_config is own
    assert tokenizer.padding_side == "right"
    assert model.config.use_cache is False


def test_the_models_generation_config_does_not_change_the_distribution() -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    plain = generate_responses(model, tokenizer, PROMPTS, max_completion_length=8)
    own = GenerationConfig(
        top_k=1,
        suppress_tokens=list(range(4, 300)),
        do_sample=True,
        eos_token_id=model.get_base_model().generation_config.eos_token_id,
    )
    model.get_base_model().generation_config = own
    assert list(generate_responses(model, tokenizer, PROMPTS, max_completion_length=8)) == list(
        plain
    )


def test_sampling_follows_the_models_distribution() -> None:
    """One token at temperature 0.4, against the softmax given that the two texts are distinct."""
    model, tokenizer = tiny_causal_lm("llama"), tiny_tokenizer()
    prompts = [Prompt(str(n), "The quick") for n in range(1500)]
    pool = generate_responses(
        model,
        tokenizer,
        prompts,
        num_generations=2,
        max_completion_length=1,
        temperature=0.4,
        max_attempts=1,
        generation_batch_size=500,
    )
    with torch.no_grad():
        ids = torch.tensor([tokenizer("The quick")["input_ids"]])
        probabilities = (model(input_ids=ids).logits[0, -1] / 0.4).softmax(-1)
    mass: dict[str, float] = {}
    for token, probability in enumerate(probabilities.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True).strip()
        mass[text] = mass.get(text, 0.0) + probability
    filled = 1.0 - mass.pop("")
    distinct = {text: p * (filled - p) for text, p in mass.items()}
    total = sum(distinct.values())
    n = len(pool)
    assert abs(n / len(prompts) - total) < 4 * (total * (1 - total) / len(prompts)) ** 0.5
    texts = [str(item.responses[0]).strip() for item in pool]
    likely = sorted(distinct, key=lambda text: -distinct[text])
    for group in ([likely[0]], [likely[1]], likely[:10], likely[50:]):
        p = sum(distinct[text] for text in group) / total
        share = sum(text in set(group) for text in texts) / n
        assert p > 0.01
        assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_a_response_ends_at_eos() -> None:
    """At the tokenizer's EOS or one of the model's own, which need not be a special token."""
    model, tokenizer = tiny_causal_lm("gpt_neox"), tiny_tokenizer()
    stop = tokenizer.convert_tokens_to_ids("Z")
    model.generation_config.eos_token_id = [stop]
    bias = torch.zeros(model.config.vocab_size)
    bias[[stop, tokenizer.eos_token_id]] = 5.0
    handle = model.get_output_embeddings().register_forward_hook(lambda *args: args[2] + bias)
    try:
        pool = generate_responses(
            model, tokenizer, PROMPTS, max_completion_length=40, max_attempts=30
        )
    finally:
        handle.remove()
    texts = [str(response) for item in pool for response in item.responses]
    assert max(len(tokenizer(text)["input_ids"]) for text in texts) < 40
    assert not any("<|endoftext|>" in text or "Z" in text for text in texts)


def test_prompts_without_enough_distinct_responses_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, tokenizer = tiny_causal_lm("llama"), tiny_tokenizer()
    with caplog.at_level("WARNING", "activedpo_fast"):
        pool = generate_responses(
            model,
            tokenizer,
            PROMPTS,
            num_generations=8,
            max_completion_length=1,
            max_attempts=2,
            temperature=0.5,
        )
    left_out = len(PROMPTS) - len(pool)
    assert 0 < left_out
    assert [record.args[:2] for record in caplog.records] == [(left_out, len(PROMPTS))]
    with pytest.raises(ActiveDPOError, match="no prompt got 2 distinct responses"):
        generate_responses(model, tokenizer, PROMPTS, max_completion_length=2, temperature=1e-4)


def test_the_space_before_a_continuation_is_kept() -> None:
    """A SentencePiece-like decoder drops a leading space; prompt + response must not lose it."""
    vocabulary = ["<unk>", "</s>", "▁", "▁the", "▁dog", "▁ran", "t", "h", "e", "d", "o", "g"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("d", "o"), ("do", "g"), ("▁", "dog")]
    vocabulary += ["th", "the", "do", "dog"]
    bpe = Tokenizer(
        models.BPE({token: n for n, token in enumerate(vocabulary)}, merges, unk_token="<unk>")
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")
    dog = vocabulary.index("▁dog")
    assert tokenizer.decode([dog]) == "dog"
    model = tiny_causal_lm("llama", vocab_size=len(vocabulary))

    def always_dog(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits).index_fill(-1, torch.tensor([dog]), 50.0)

    model.get_output_embeddings().register_forward_hook(always_dog)
    texts = respond(model, tokenizer, [Prompt("a", "the dog")], max_completion_length=2)
    assert texts == [" dog dog"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_generations=1), "num_generations: 1 is below 2"),
        (dict(max_attempts=0), "max_attempts: 0 is below 1"),
        (dict(max_completion_length=0), "max_completion_length: 0 is below 1"),
        (dict(generation_batch_size=0), "generation_batch_size: 0 is below 1"),
        (dict(temperature=0.0), "temperature: 0.0 is not above 0"),
        (dict(temperature=float("nan")), "temperature: nan is not above 0"),
        (dict(top_p=1.5), "top_p: 1.5 is not in"),
        (dict(prompts=[]), "there are no prompts"),
        (dict(prompts=[PROMPTS[0], PROMPTS[0]]), "prompt 2: the same prompt as prompt 1: remove"),
        (
            dict(prompts=[PROMPTS[0], replace(PROMPTS[1], id="p0")]),
            "prompt 2: id 'p0' is already that of prompt 1, another prompt",
        ),
        (dict(prompts=[Prompt("a", " ")]), "prompt 1: the prompt is empty"),
        (
            dict(prompts=[PROMPTS[0], CHATS[1]]),
            "prompt 2: chat messages, but prompt 1 has plain text",
        ),
        (dict(prompts=CHATS), "no chat template"),
        (
            dict(max_completion_length=255),
            r"item 'p0': 3 prompt tokens and max_completion_length=255 exceed",
        ),
        (dict(arch="llama", vocab_size=200), r"item 'p0': the prompt has the token id \d+"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"prompts": PROMPTS, **options}
    sizes = {"vocab_size": arguments.pop("vocab_size")} if "vocab_size" in arguments else {}
    model = tiny_causal_lm(arguments.pop("arch", "gpt2"), **sizes)
    with pytest.raises(ActiveDPOError, match=message) as caught:
        generate_responses(model, tiny_tokenizer(), **arguments)
    assert "\n" not in str(caught.value)
