"""Token ids, scored tokens and log-probabilities against the real `trl.DPOTrainer`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.items import PoolItem
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import TokenizedResponse, tokenize_pool
from tests.support.models import ORIGINAL_LENGTH, lora, tiny_causal_lm, tiny_tokenizer, varying_lm
from tests.support.quick import slow_except

trl = pytest.importorskip("trl")

# (prompt, responses): tokens that merge over the boundary, spaces and newlines on either side,
# text that already ends in EOS, EOS in the middle, other scripts, and lengths on both sides of the
# limits.
_PLAIN = [
    ("The quick", [" brown fox", "er than a dog", " brown fox jumps over"]),
    ("The qui", ["ck brown fox.", " ck.", " is"]),
    ("TL;DR: ", ["choose well", " label less", "choose well<|endoftext|>"]),
    ("What is a sketch?\n", ["\nA short random projection.", "x<|endoftext|>y", " A"]),
    ("Größe: 日本語 ", ["ça va 🙂", "🙂🙃", "naïve – ſ"]),
    ("people prefer one of them " * 3, ["yes", "no, they do not at all", "maybe"]),
    ("0123456789 times. " * 12, ["long prompt", "a", "b"]),
    ("A", ["The quick brown fox jumps over the lazy dog, " * 8, "B", "C"]),
]

# A template that puts something between prompt and response only when the response is to come.
_THINKING = (
    "{% if style is defined %}{{ style }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>\n{% endif %}"
)


def _chat_rows() -> list[tuple[Any, list[Any]]]:
    rows: list[tuple[Any, list[Any]]] = []
    for n, (prompt, responses) in enumerate(_PLAIN):
        messages = [{"role": "user", "content": prompt}]
        if n % 2:
            messages = [{"role": "system", "content": "A library."}, *messages]
        rows.append(
            (messages, [[{"role": "assistant", "content": response}] for response in responses])
        )
    rows[0][1][0].append({"role": "user", "content": "And then?"})
    return rows


def _pool(kind: str) -> PreferencePool:
    rows = _PLAIN if kind.startswith("plain") else _chat_rows()
    return PreferencePool(
        PoolItem(f"item-{n}", prompt, tuple(responses))
        for n, (prompt, responses) in enumerate(rows)
    )


def _tokenizer(kind: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer(chat=kind.startswith("chat"))
    if kind == "plain-bos-eos":
        eos = ("<|endoftext|>", 0)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A <|endoftext|>",
            special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>")), eos],
        )
    if kind == "chat-thinking":
        tokenizer.chat_template = _THINKING
    return tokenizer


def _trainer(
    pool: PreferencePool,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Any,
    arch: str,
    max_length: int | None,
    truncation_mode: str,
    columns: dict[str, Any] | None = None,
    model: PeftModel | None = None,
) -> Any:
    """DPOTrainer on a data set of every pair of the pool."""
    offsets = pool.response_offsets.tolist()
    rows = []
    for a, b in pool.pairs().tolist():
        position, i = pool.locate(a)
        responses = pool[position].responses
        rows.append(
            {
                "prompt": pool[position].prompt,
                "chosen": responses[i],
                "rejected": responses[b - offsets[position]],
                "pair": [a, b],
                **(columns or {}),
            }
        )
    config = trl.DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=4,
        max_length=max_length,
        truncation_mode=truncation_mode,
    )
    model = lora(tiny_causal_lm(arch), arch) if model is None else model
    return trl.DPOTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def _assert_same_pair(
    collated: dict[str, torch.Tensor], which: int, ours: TokenizedResponse
) -> None:
    real = collated["attention_mask"][which].bool()
    assert collated["input_ids"][which][real].tolist() == list(ours.input_ids)
    expected = [int(n >= ours.completion_start) for n in range(len(ours.input_ids))]
    assert collated["completion_mask"][which][real].tolist() == expected


_LIMITS = [
    (None, "keep_start"),
    (1024, "keep_start"),
    (24, "keep_start"),
    (24, "keep_end"),
    (2, "keep_start"),
    (2, "keep_end"),
]


# Plain text with every limit, and every kind of text with one.
@pytest.mark.parametrize(
    ("kind", "max_length", "truncation_mode"),
    slow_except(
        [
            *(("plain", *limit) for limit in _LIMITS),
            ("plain-bos-eos", None, "keep_start"),
            *(("chat", 24, "keep_end"), ("chat", None, "keep_start")),
            ("chat-thinking", 24, "keep_start"),
        ],
        [
            (kind, *limit)
            for kind in ("plain", "plain-bos-eos", "chat", "chat-thinking")
            for limit in _LIMITS
        ],
    ),
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_tokens_of_every_pair(
    kind: str, max_length: int | None, truncation_mode: Any, tmp_path: Any
) -> None:
    """Items of two responses, so that only the pair decides where the response starts."""
    full = _pool(kind)
    pool = PreferencePool(
        PoolItem(f"{item.id}-{i}{j}", item.prompt, (item.responses[i], item.responses[j]))
        for item in full
        for i, j in ((0, 1), (0, 2), (1, 2))
    )
    tokenizer = _tokenizer(kind)
    ours = tokenize_pool(pool, tokenizer, max_length=max_length, truncation_mode=truncation_mode)
    trainer = _trainer(pool, tokenizer, tmp_path, "llama", max_length, truncation_mode)

    kept = [pair for pair in pool.pairs().tolist() if pool.locate(pair[0])[0] not in ours.skipped]
    assert [row["pair"] for row in trainer.train_dataset] == kept
    if (max_length, truncation_mode) == (24, "keep_start"):
        assert 0 < len(ours.skipped) < len(pool)
    for row in trainer.train_dataset:
        collated = trainer.data_collator([row])
        for which, response in enumerate(row["pair"]):
            _assert_same_pair(collated, which, ours.sequences[response])
            if max_length is None:
                start = ours.sequences[response].completion_start
                ids = list(ours.sequences[response].input_ids)
                assert row["prompt_ids"] == ids[:start]
                assert row["chosen_ids" if which == 0 else "rejected_ids"] == ids[start:]


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_items_of_three_responses(
    kind: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The ids are always those of the trainer. The start is the same, or comes earlier with a
    warning."""
    pool, tokenizer = _pool(kind), _tokenizer(kind)
    with caplog.at_level("WARNING", "activedpo_fast"):
        ours = tokenize_pool(pool, tokenizer, max_length=None)
    warned = [record.args for record in caplog.records if "start at different" in record.msg]
    trainer = _trainer(pool, tokenizer, tmp_path, "llama", None, "keep_start")
    differing = set()
    for row in trainer.train_dataset:
        for response, ids in zip(
            row["pair"], (row["chosen_ids"], row["rejected_ids"]), strict=True
        ):
            sequence = ours.sequences[response]
            assert list(sequence.input_ids) == row["prompt_ids"] + ids
            assert sequence.completion_start <= len(row["prompt_ids"])
            if sequence.completion_start < len(row["prompt_ids"]):
                differing.add(pool.locate(response)[0])
    assert len(differing) == (1 if kind == "plain" else 0)
    assert warned == ([(1, len(pool))] if differing else [])


def test_chat_template_kwargs(tmp_path: Any) -> None:
    """They have the effect of a `chat_template_kwargs` column on the trainer."""
    pool, tokenizer = _pool("chat-thinking")[1:2], _tokenizer("chat-thinking")
    kwargs = {"style": "brief"}
    ours = tokenize_pool(pool, tokenizer, chat_template_kwargs=kwargs)
    assert ours != tokenize_pool(pool, tokenizer)
    trainer = _trainer(
        pool, tokenizer, tmp_path, "llama", 1024, "keep_start", {"chat_template_kwargs": kwargs}
    )
    for row in trainer.train_dataset:
        collated = trainer.data_collator([row])
        for which, response in enumerate(row["pair"]):
            _assert_same_pair(collated, which, ours.sequences[response])


def _log_prob(model: torch.nn.Module, response: TokenizedResponse) -> float:
    """log π(y|x) of one sequence alone, summed in float64."""
    ids = torch.tensor([response.input_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].double()
    log_probs = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return float(log_probs[max(response.completion_start, 1) - 1 :].sum())


@pytest.mark.parametrize(
    ("arch", "kind", "max_length", "truncation_mode"),
    slow_except(
        [
            ("llama", "plain", 200, "keep_start"),
            ("gemma", "chat", 24, "keep_start"),
            ("gpt2", "plain", 24, "keep_end"),
        ],
        [
            (*model, *limit)
            for model in (("llama", "plain"), ("gemma", "chat"), ("gpt2", "plain"))
            for limit in ((200, "keep_start"), (24, "keep_start"), (24, "keep_end"))
        ],
    ),
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_log_probs_of_every_pair(
    arch: str, kind: str, max_length: int, truncation_mode: Any, tmp_path: Any
) -> None:
    """The trainer's own padded batches and fused head against one plain pass per sequence."""
    pool, tokenizer = _pool(kind), _tokenizer(kind)
    # Pairs of the first two responses alone: see test_items_of_three_responses.
    pool = PreferencePool(PoolItem(item.id, item.prompt, item.responses[:2]) for item in pool)
    ours = tokenize_pool(pool, tokenizer, max_length=max_length, truncation_mode=truncation_mode)
    trainer = _trainer(pool, tokenizer, tmp_path, arch, max_length, truncation_mode)
    model = trainer.model.eval()
    rows = list(trainer.train_dataset)
    # The model as the trainer has it: patched forward, reference adapter and all.
    extracted = FeatureExtractor(model, Sketch("sjlt", 16)).gradients(ours).logps
    for begin in range(0, len(rows), 4):
        batch = trainer.data_collator(rows[begin : begin + 4])
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad():
            per_token = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            ).log_probs
        theirs = per_token.sum(1).chunk(2)
        # The reference starts as a copy of the adapter, so it must say the same.
        reference = trainer.compute_ref_log_probs(model, batch)
        for n, row in enumerate(rows[begin : begin + 4]):
            for which, response in enumerate(row["pair"]):
                expected = _log_prob(model, ours.sequences[response])
                assert expected < -1.0
                assert float(theirs[which][n]) == pytest.approx(expected, rel=1e-5)
                assert float(reference[which][n]) == pytest.approx(expected, rel=1e-5)
                assert float(extracted[response]) == pytest.approx(expected, rel=1e-5)


def test_log_probs_with_positions_by_the_length_of_the_batch(tmp_path: Any) -> None:
    """Phi-3's longrope: the trainer on one pair at a time, both responses on the same side of the
    original length."""
    texts = [item for item in _PLAIN if len(set(item[1])) == 3]
    pool = PreferencePool(
        PoolItem(f"item-{n}", prompt, tuple(responses[:2]))
        for n, (prompt, responses) in enumerate(texts)
    )
    tokenizer = _tokenizer("plain")
    ours = tokenize_pool(pool, tokenizer, max_length=120)
    lengths = [len(sequence.input_ids) for sequence in ours.sequences]
    model = varying_lm("phi3 longrope", torch.float32)
    trainer = _trainer(pool, tokenizer, tmp_path, "phi3", 120, "keep_start", model=model)
    extracted = FeatureExtractor(trainer.model, Sketch("sjlt", 16)).gradients(ours).logps
    sides = []
    for row in trainer.train_dataset:
        beyond = [lengths[response] > ORIGINAL_LENGTH for response in row["pair"]]
        if beyond[0] == beyond[1]:
            sides.append(beyond[0])
            theirs = trainer.compute_ref_log_probs(trainer.model, trainer.data_collator([row]))
            for which, response in enumerate(row["pair"]):
                assert float(extracted[response]) == pytest.approx(float(theirs[which]), rel=1e-5)
    assert set(sides) == {True, False}


def test_defaults_are_those_of_dpo_config(tmp_path: Any) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(tokenize_pool).parameters.items()
    }
    config = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert defaults["max_length"] == config.max_length
    assert defaults["truncation_mode"] == config.truncation_mode
