"""Tokens for encoder-decoder models, with the tokenizers of T5 and mBART on a few words."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import normalizers
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from activedpo_fast import ActiveDPOError, PreferencePool
from activedpo_fast.models.encoder_decoder import decoder_start_token_id
from activedpo_fast.pool.tokens import completion_tokens, scored_tokens, tokenize_pool
from tests.support.encoder_decoder import tiny_model
from tests.support.models import tiny_causal_lm, tiny_tokenizer

WORDS = [("▁a", -1.0), ("▁b", -1.0), ("▁the", -1.0), ("▁fox", -1.0), ("▁", -2.0)]
POOL = PreferencePool.from_rows(
    [
        {"prompt": "the fox", "responses": ["a", "b a the"]},
        {"prompt": "a b a b a b", "responses": ["fox</s>", "b"]},
    ]
)


def t5_tokenizer() -> Any:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *WORDS]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def mbart_tokenizer() -> Any:
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    languages = [(code, 0.0) for code in FAIRSEQ_LANGUAGE_CODES]
    return transformers.MBartTokenizer(
        vocab=[*special, *WORDS, *languages, ("<mask>", 0.0)], src_lang="en_XX", tgt_lang="de_DE"
    )


def test_t5() -> None:
    """Both sides end with EOS, once."""
    model = tiny_model("t5", decoder_start_token_id=0, pad_token_id=0)
    tokenizer = t5_tokenizer()
    start = decoder_start_token_id(model, tokenizer)
    assert start == 0
    tokens = tokenize_pool(POOL, tokenizer, decoder_start_token_id=start)
    a, b, the, fox, eos = 3, 4, 5, 6, 1
    assert [list(sequence.input_ids) for sequence in tokens.sequences] == [
        [the, fox, eos, 0, a, eos],
        [the, fox, eos, 0, b, a, the, eos],
        [a, b, a, b, a, b, eos, 0, fox, eos],
        [a, b, a, b, a, b, eos, 0, b, eos],
    ]
    assert [sequence.completion_start for sequence in tokens.sequences] == [4, 4, 8, 8]
    assert list(map(scored_tokens, tokens.sequences)) == [2, 4, 2, 2]
    assert list(map(completion_tokens, tokens.sequences)) == [2, 4, 2, 2]
    assert tokens.encoder_decoder and tokens.only([0, 2]).encoder_decoder


def test_mbart() -> None:
    """A response ends with EOS and its language, with which the decoder begins."""
    tokenizer = mbart_tokenizer()
    start = decoder_start_token_id(tiny_model("mbart"), tokenizer)
    english, german = tokenizer.convert_tokens_to_ids(["en_XX", "de_DE"])
    assert start == german
    tokens = tokenize_pool(POOL[:1], tokenizer, decoder_start_token_id=start)
    assert list(tokens.sequences[0].input_ids) == [6, 7, 2, english, german, 4, 2, german]
    assert tokens.sequences[0].completion_start == 5
    assert tokenizer("a")["input_ids"] == [4, 2, english]  # as it was


def test_a_tokenizer_that_adds_no_eos() -> None:
    tokenizer = tiny_tokenizer()
    pool = PreferencePool.from_rows(
        [{"prompt": "The fox", "responses": [" dog", " dog<|endoftext|>"]}]
    )
    tokens = tokenize_pool(pool, tokenizer, decoder_start_token_id=7)
    prompt, dog = tokenizer.encode("The fox"), tokenizer.encode(" dog")
    for sequence in tokens.sequences:
        assert list(sequence.input_ids) == [*prompt, 7, *dog, tokenizer.eos_token_id]


def test_truncation(caplog: pytest.LogCaptureFixture) -> None:
    tokens = tokenize_pool(POOL, t5_tokenizer(), decoder_start_token_id=0, max_length=7)
    assert list(map(scored_tokens, tokens.sequences)) == [2, 3, 0, 0]
    assert list(tokens.sequences[1].input_ids) == [5, 6, 1, 0, 4, 3, 5]
    assert tokens.skipped == [1]
    assert "1 of 4 responses are longer than max_length=7 with their prompt" in caplog.text
    assert "1 of 2 prompts fill max_length=7 and are skipped" in caplog.text
    assert "DPOTrainer" not in caplog.text


def test_decoder_only_models_have_no_start_token() -> None:
    assert decoder_start_token_id(tiny_causal_lm("llama"), tiny_tokenizer()) is None


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ActiveDPOError, match="no EOS token"):
        decoder_start_token_id(tiny_model("t5"), tokenizer)


def test_what_is_refused() -> None:
    messages = [{"role": "user", "content": "a"}]
    answer = [{"role": "assistant", "content": "b"}]
    chat = PreferencePool.from_rows([{"prompt": messages, "responses": [answer, answer * 3]}])
    silent = PreferencePool.from_rows([{"id": "x", "prompt": "hm", "responses": ["a", "b"]}])
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("hm", "")
    for pool, options, message in (
        (chat, {}, "encoder-decoder models are supported with plain text alone"),
        (POOL, {"truncation_mode": "keep_end"}, "would cut the prompt that an encoder reads"),
        (silent, {}, "item 'x': the prompt has no token"),
    ):
        with pytest.raises(ActiveDPOError, match=message) as caught:
            tokenize_pool(pool, tokenizer, decoder_start_token_id=0, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
