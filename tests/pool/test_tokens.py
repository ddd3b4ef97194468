"""Token ids by rules written out by hand; the comparison with TRL itself is an integration test."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.items import PoolItem
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import TokenizedResponse, scored_tokens, tokenize_pool
from tests.support.models import tiny_tokenizer

EOS = "<|endoftext|>"


def _pool(*rows: tuple[Any, list[Any]]) -> PreferencePool:
    return PreferencePool(
        PoolItem(f"i{n}", prompt, tuple(responses)) for n, (prompt, responses) in enumerate(rows)
    )


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_plain_text_gets_eos_once() -> None:
    tokenizer = tiny_tokenizer()
    pool = _pool(("The quick", [" brown fox", f" dog{EOS}", f"{EOS} dog"]))
    result = tokenize_pool(pool, tokenizer)
    prompt = tokenizer("The quick")["input_ids"]
    for sequence, text in zip(result.sequences, (" brown fox", " dog", f"{EOS} dog"), strict=True):
        assert list(sequence.input_ids) == tokenizer(f"The quick{text}{EOS}")["input_ids"]
        assert list(sequence.input_ids[: sequence.completion_start]) == prompt
        assert sequence.input_ids[-1] == tokenizer.eos_token_id
    assert result.skipped == []


def test_chat_goes_through_the_template() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    result = tokenize_pool(_pool((_user("What?"), [_assistant("A"), _assistant("B")])), tokenizer)
    start = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    for sequence, text in zip(result.sequences, "AB", strict=True):
        assert tokenizer.decode(sequence.input_ids) == f"{start}{text}<|im_end|>\n"
        assert tokenizer.decode(sequence.input_ids[: sequence.completion_start]) == start


def test_tokens_that_merge_over_the_boundary() -> None:
    """The response begins at the token with its first letter, for both responses of the item."""
    tokenizer = tiny_tokenizer()
    result = tokenize_pool(_pool(("The qui", ["ck brown", " A"])), tokenizer)
    assert tokenizer.decode(result.sequences[0].input_ids) == f"The quick brown{EOS}"
    starts = [sequence.completion_start for sequence in result.sequences]
    assert starts[0] == starts[1] < len(tokenizer("The qui")["input_ids"])


def test_a_merge_that_leaves_a_shorter_sequence() -> None:
    """Prompt and response together have fewer tokens than the prompt and are its beginning."""
    tokenizer = tiny_tokenizer()
    ids = {"ab": [5, 6, 7], "abx": [5, 6], "aby": [5, 6, 7, 8]}

    class Odd(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: list[str], **_: Any) -> Any:
            return {"input_ids": [ids[one.removesuffix(EOS)] for one in text]}

    tokenizer.__class__ = Odd
    with pytest.raises(ActiveDPOError, match="item 'i0': response 1 adds no token"):
        tokenize_pool(_pool(("ab", ["x", "y"])), tokenizer)


@pytest.mark.parametrize("count", [2, 3])
def test_warning_counts_items_whose_pairs_the_trainer_starts_later(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("The qui", ["ck brown", " A", " dog"][:count]), ("The quick", [" a", " b", " c"])]
    with caplog.at_level("WARNING", "activedpo_fast"):
        tokenize_pool(_pool(*rows), tiny_tokenizer())
    counts = [record.args for record in caplog.records if "three or more" in record.msg]
    assert counts == ([(1, 2)] if count == 3 else [])


@pytest.mark.parametrize(
    ("mode", "kept", "scored"), [("keep_start", slice(0, 6), 1), ("keep_end", slice(-6, None), 5)]
)
def test_truncation(mode: Any, kept: slice, scored: int) -> None:
    tokenizer = tiny_tokenizer()
    pool = _pool(("~~~~~", ["ZZZZZZZZ", "8"]))
    whole = tokenize_pool(pool, tokenizer, max_length=None).sequences
    assert [whole[0].completion_start, whole[1].completion_start] == [5, 5]
    cut = tokenize_pool(pool, tokenizer, max_length=6, truncation_mode=mode)
    assert cut.sequences[0].input_ids == whole[0].input_ids[kept]
    assert scored_tokens(cut.sequences[0]) == scored
    assert cut.skipped == []


def test_prompts_that_fill_max_length_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    pool = _pool(("A", ["B", "C"]), ("0123456789" * 3, ["B", "C"]), ("D", ["E", "F", "G"]))
    with caplog.at_level("WARNING", "activedpo_fast"):
        result = tokenize_pool(pool, tokenizer, max_length=10)
    assert result.skipped == [1]
    assert len(result.sequences) == pool.n_responses
    assert [scored_tokens(sequence) > 0 for sequence in result.sequences] == [
        True,
        True,
        False,
        False,
        True,
        True,
        True,
    ]
    assert [record.args for record in caplog.records] == [(1, 3, 10, ", as in DPOTrainer")]
    assert tokenize_pool(pool, tokenizer, max_length=10, truncation_mode="keep_end").skipped == []


def test_the_limit_is_the_prompts_length() -> None:
    """A prompt of exactly max_length tokens is skipped, one shorter is not."""
    tokenizer = tiny_tokenizer()
    pool = _pool(("0123", ["4", "5"]))
    start = tokenize_pool(pool, tokenizer).sequences[0].completion_start
    assert tokenize_pool(pool, tokenizer, max_length=start).skipped == [0]
    shorter = tokenize_pool(pool, tokenizer, max_length=start + 1)
    assert shorter.skipped == [] and scored_tokens(shorter.sequences[0]) == 1


@pytest.mark.parametrize(
    ("length", "start", "expected"), [(5, 2, 3), (5, 0, 4), (5, 1, 4), (5, 5, 0), (1, 0, 0)]
)
def test_scored_tokens(length: int, start: int, expected: int) -> None:
    assert scored_tokens(TokenizedResponse(list(range(length)), start)) == expected


def test_every_batch_keeps_pool_order() -> None:
    """More items than one batch of the tokenizer."""
    tokenizer = tiny_tokenizer()
    pool = _pool(*((f"item {n}", [f" a{n}", f" b{n}"]) for n in range(600)))
    for row, sequence in enumerate(tokenize_pool(pool, tokenizer).sequences):
        position, which = pool.locate(row)
        text = f"item {position} {'ab'[which]}{position}{EOS}"
        assert tokenizer.decode(sequence.input_ids) == text


class _Processor(ProcessorMixin):
    def __init__(self) -> None:
        pass


def test_bad_input() -> None:
    plain = _pool(("A", ["B", "C"]))
    chat = _pool((_user("A"), [_assistant("B"), _assistant("C")]))
    no_eos = tiny_tokenizer()
    no_eos.eos_token = None
    refusing = tiny_tokenizer(chat=True)
    refusing.chat_template = "{{ raise_exception('roles must\n alternate') }}"
    deaf = tiny_tokenizer(chat=True)
    deaf.chat_template = "{{ messages[0]['content'] }}"
    chatty = tiny_tokenizer(chat=True)
    cases: list[tuple[PreferencePool, Any, dict[str, Any], str]] = [
        (plain, no_eos, {}, "no EOS token"),
        (chat, tiny_tokenizer(), {}, "no chat template"),
        (plain, None, {}, "expected a transformers tokenizer, got NoneType"),
        (plain, _Processor(), {}, "_Processor is a processor"),
        (chat, refusing, {}, "item 'i0': the chat template failed: roles must alternate"),
        (chat, deaf, {}, "item 'i0': response 1 adds no token"),
        (chat, chatty, dict(chat_template_kwargs={"tokenize": False}), "'tokenize' is set by"),
        (chat, chatty, dict(chat_template_kwargs=["x"]), "chat_template_kwargs: expected an obj"),
        (plain, tiny_tokenizer(), dict(max_length=1), "max_length: 1 leaves no token"),
        (plain, tiny_tokenizer(), dict(truncation_mode="middle"), "truncation_mode: 'middle'"),
    ]
    for pool, tokenizer, options, message in cases:
        with pytest.raises(ActiveDPOError, match=message) as caught:
            tokenize_pool(pool, tokenizer, **options)
        assert "\n" not in str(caught.value)


def test_tokenizer_is_left_as_it_was() -> None:
    tokenizer = tiny_tokenizer(padding_side="left")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    before = tokenizer.backend_tokenizer.to_str()
    tokenize_pool(_pool(("A", ["B", "C"])), tokenizer, max_length=2)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(("mode", "end"), [("keep_start", "end"), ("keep_end", "beginning")])
def test_truncation_is_logged(mode: Any, end: str, caplog: pytest.LogCaptureFixture) -> None:
    pool = PreferencePool.from_rows([{"prompt": "The", "responses": [" fox", " dog " * 9]}])
    tokenize_pool(pool, tiny_tokenizer(), max_length=100, truncation_mode=mode)
    assert "cut at" not in caplog.text
    tokenize_pool(pool, tiny_tokenizer(), max_length=8, truncation_mode=mode)
    assert (
        "1 of 2 responses are longer than max_length=8 with their prompt and are cut at the "
        f"{end}, as in DPOTrainer"
    ) in caplog.text


def test_some_responses_keep_their_items_and_places() -> None:
    rows = [
        {"id": f"q{i}", "prompt": f"Question {i}?", "responses": [f" {i}{j}" for j in range(3)]}
        for i in range(3)
    ]
    tokens = tokenize_pool(PreferencePool.from_rows(rows), tiny_tokenizer())
    part = tokens.only([1, 5, 6, 8])
    assert part.sequences == [tokens.sequences[row] for row in (1, 5, 6, 8)]
    assert [part.item_of(row) for row in range(4)] == [0, 1, 2, 2]
    assert [part.place(row) for row in range(4)] == [tokens.place(row) for row in (1, 5, 6, 8)]
    assert part.only([1, 3]).place(1) == tokens.place(8) == "item 'q2', response 3"
