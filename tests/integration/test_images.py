"""Prompts with images: read, kept, handed to DPOTrainer, and features of them."""

from __future__ import annotations

import base64
import io
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("PIL")

from datasets import Dataset, Image, List  # noqa: E402
from PIL import Image as PIL  # noqa: E402

from activedpo_fast import ActiveDPOSelector  # noqa: E402
from activedpo_fast.errors import ActiveDPOError  # noqa: E402
from activedpo_fast.gradients.extractor import FeatureExtractor  # noqa: E402
from activedpo_fast.gradients.sketch import Sketch  # noqa: E402
from activedpo_fast.labels.judge.oracle import JudgeOracle  # noqa: E402
from activedpo_fast.pool.images import image_bytes, open_image  # noqa: E402
from activedpo_fast.pool.items import PoolItem, Prompt  # noqa: E402
from activedpo_fast.pool.messages import images_of  # noqa: E402
from activedpo_fast.pool.pool import PreferencePool  # noqa: E402
from activedpo_fast.pool.reading import read_prompts  # noqa: E402
from activedpo_fast.pool.tokens import tokenize_pool  # noqa: E402
from activedpo_fast.selection.result import Selection  # noqa: E402
from activedpo_fast.store.token_hashes import token_hashes  # noqa: E402
from activedpo_fast.training.generation import generate_responses  # noqa: E402
from tests.support.quick import slow_except  # noqa: E402
from tests.support.vision import (  # noqa: E402
    ARCHS,
    PLACE,
    picture,
    picture_file,
    tiny_processor,
    tiny_vlm,
    with_lora,
)


def _say(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def _ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _rows(folder: Path) -> list[dict[str, Any]]:
    """An image before a text, two images in places, none, and one in a longer conversation."""
    parts = [
        {"type": "text", "text": "Compare "},
        {"type": "image"},
        {"type": "text", "text": " with "},
        {"type": "image"},
    ]
    files = [picture_file(folder, seed, size=(40, 30)) for seed in range(4)]
    return [
        {
            "id": "one",
            "prompt": [{"role": "system", "content": "Look."}, *_ask("What is this?")],
            "images": [files[0]],
            "chosen": _say("A cat."),
            "rejected": _say("A dog in the park."),
        },
        {
            "id": "two",
            "prompt": [{"role": "user", "content": parts}],
            "images": files[1:3],
            "chosen": _say("The first is darker."),
            "rejected": _say("Same."),
        },
        {
            "id": "none",
            "prompt": _ask("Say hello."),
            "images": [],
            "chosen": _say("Hello!"),
            "rejected": _say("Go away."),
        },
        {
            "id": "turns",
            "prompt": [*_ask("What is this?"), *_say("A bird."), *_ask("What color?")],
            "images": [files[3]],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Blue."}]}],
            "rejected": _say("Red, I think."),
        },
    ]


def _selector(strategy: str, arch: str = "llava", **options: Any) -> ActiveDPOSelector:
    model, processor = with_lora(tiny_vlm(arch)), tiny_processor(arch)
    return ActiveDPOSelector(model, processor, strategy=strategy, proj_dim=64, **options)


def _trainer(dataset: Dataset, folder: Path, arch: str = "llava") -> Any:
    trl = pytest.importorskip("trl")
    config = trl.DPOConfig(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        max_steps=1,
        per_device_train_batch_size=4,
        max_length=None,
    )
    return trl.DPOTrainer(
        model=with_lora(tiny_vlm(arch)),
        args=config,
        train_dataset=dataset,
        processing_class=tiny_processor(arch),
    )


# -- reading and handing over ----------------------------------------------------------------------


def test_every_source_gives_the_same_prompts(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    pool = PreferencePool.from_rows(rows)
    images = [images_of(item.prompt) for item in pool]
    assert images == [row["images"] for row in rows]
    assert all(item.extra == {} for item in pool)
    assert pool[0].prompt[1]["content"] == [
        {"type": "image", "image": images[0][0]},
        {"type": "text", "text": "What is this?"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool.to_jsonl(tmp_path / "pool.jsonl")
    assert list(PreferencePool.load(tmp_path / "rows.jsonl")) == list(pool)
    assert list(PreferencePool.load(tmp_path / "pool.jsonl")) == list(pool)
    decoded = Dataset.from_list(rows[:1]).cast_column("images", List(Image()))
    assert list(PreferencePool.from_dataset(decoded)) == list(pool)[:1]
    decoded.save_to_disk(tmp_path / "saved")
    saved = PreferencePool.load(tmp_path / "saved")  # which has the files themselves
    [image] = images_of(saved[0].prompt)
    assert image_bytes(image, "") == Path(images[0][0]).read_bytes()


def test_images_in_memory_become_data(tmp_path: Path) -> None:
    """PIL images, bytes, and the files inside Parquet: exactly the same pixels come out."""
    buffer = io.BytesIO()
    picture(1).save(buffer, format="JPEG")
    jpeg = buffer.getvalue()
    base = {"prompt": _ask("What?"), "chosen": _say("a"), "rejected": _say("b")}
    rows = [
        {**base, "image": picture(0)},
        {**base, "image": jpeg},
        {**base, "image": {"bytes": jpeg, "path": "gone.jpg"}},
        {**base, "image": tmp_path / "x.png"},
    ]
    found = [PreferencePool.from_rows([row])[0].prompt[0]["content"][0]["image"] for row in rows]
    assert found[0].startswith("data:image/png;base64,")
    assert found[1] == found[2] == f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    assert found[3] == str(tmp_path / "x.png")
    assert np.array_equal(np.asarray(open_image(found[0], "")), np.asarray(picture(0)))
    assert np.array_equal(np.asarray(open_image(found[1], "")), np.asarray(PIL.open(buffer)))
    table = pa.Table.from_pylist([{**base, "images": [{"bytes": jpeg, "path": "a.jpg"}]}])
    pq.write_table(table, tmp_path / "pool.parquet")
    pool = PreferencePool.load(tmp_path / "pool.parquet")
    assert images_of(pool[0].prompt) == [found[1]]
    pool.to_jsonl(tmp_path / "pool.jsonl")
    assert list(PreferencePool.load(tmp_path / "pool.jsonl")) == list(pool)


def test_the_same_question_about_other_images_is_another_prompt(tmp_path: Path) -> None:
    base = {"prompt": _ask("A cat?"), "chosen": _say("yes"), "rejected": _say("no")}
    rows = [{**base, "image": picture_file(tmp_path, seed)} for seed in (0, 1)]
    pool = PreferencePool.from_rows(rows)
    assert len(set(pool.ids)) == 2
    picked = _selector("random").select(pool, 2, labeled=None)
    again = _selector("random").select(pool, 2, labeled=picked[:1])
    assert [pick.id for pick in again] == [picked[1].id]
    with pytest.raises(ActiveDPOError, match="the same row"):
        PreferencePool.from_rows([rows[0], rows[0]])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"prompt": "What?"}, "images need a prompt of chat messages"),
        ({"image": "a.png", "images": ["a.png"]}, "both columns 'image' and 'images'"),
        ({"images": "a.png"}, "'images' must be a list"),
        ({"images": ["http://x.test/a.png"]}, "an address on the network: download"),
        ({"images": [3]}, "'images': expected a path, a PIL image"),
        ({"images": [{"path": None}]}, "'images': expected a path, a PIL image"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "images": ["a"] * 2},
            "has 1",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}] * 3}], "images": ["a"]},
            "has 3",
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "an image without a file"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image", "image": "a"}]}]}, "only"),
        (
            {"prompt": [{"role": "tool", "content": [{"type": "image", "image": "a"}]}]},
            "which only the prompt",
        ),
        ({"images": ["a.png"], "tools": [{"name": "f"}]}, "DPOTrainer leaves out"),
    ],
)
def test_what_is_refused(change: dict[str, Any], fault: str) -> None:
    base = {"prompt": _ask("What?"), "chosen": _say("yes"), "rejected": _say("no")}
    if change.get("prompt") == "What?":
        base, change = {"chosen": "yes", "rejected": "no"}, {"prompt": "What?", "images": ["a"]}
    with pytest.raises(ActiveDPOError, match=f"^row 1: .*{fault}") as error:
        PreferencePool.from_rows([{**base, **change}])
    assert "\n" not in str(error.value)


def test_an_item_has_its_images_in_its_prompt() -> None:
    item = PoolItem("a", _ask("What?"), (_say("yes"), _say("no")), {"images": ["a.png"]})
    with pytest.raises(
        ActiveDPOError, match="^item 1: the column 'images': an item has its images"
    ):
        PreferencePool([item])


def test_responses_to_images_are_not_sampled(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": _ask("What?"), "images": ["a.png"]}) + "\n")
    with pytest.raises(ActiveDPOError, match="line 1: the column 'images': .* sample them first"):
        read_prompts(path)
    prompt = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    with pytest.raises(ActiveDPOError, match="prompt 1: has images, and rounds are of texts"):
        generate_responses(with_lora(tiny_vlm()), tiny_processor(), [Prompt("a", prompt)])


def test_random_picks_need_no_processor_and_reach_the_trainer(tmp_path: Path) -> None:
    """A tokenizer is enough for strategies that do not use the model; no image is even opened."""
    rows = _rows(tmp_path)
    rewarded = [{**row, "reward": [n, 0.0]} for n, row in enumerate(rows)]
    pool = PreferencePool.from_rows(rewarded)
    tokenizer = tiny_processor().tokenizer
    tokenizer.chat_template = tiny_processor().chat_template
    for row in rows:
        for image in row["images"]:
            Path(image).rename(f"{image}.away")
    options: dict[str, Any] = {
        "random": {},
        "reward_gap": {"strategy_options": {"reward": "reward"}},
    }
    for strategy, given in options.items():
        selector = ActiveDPOSelector(with_lora(tiny_vlm()), tokenizer, strategy=strategy, **given)
        picked = selector.select(pool, 4)
        assert {pick.id for pick in picked} == set(pool.ids)
    assert [pick.id for pick in picked] == ["turns", "none", "two", "one"]
    picked.to_jsonl(tmp_path / "picks.jsonl")
    assert Selection.from_jsonl(tmp_path / "picks.jsonl", strategy="reward_gap") == picked
    with pytest.raises(ActiveDPOError, match="id 'turns': there is no image file"):
        picked.to_dataset([0] * 4)
    for row in rows:
        for image in row["images"]:
            Path(f"{image}.away").rename(image)
    dataset = picked.to_dataset([0, 0, 1, 0])
    assert dataset.column_names == ["id", "prompt", "chosen", "rejected", "images"]
    assert [len(images) for images in dataset["images"]] == [1, 0, 2, 1]
    assert np.array_equal(
        np.asarray(dataset[3]["images"][0]), np.asarray(PIL.open(rows[0]["images"][0]))
    )
    assert dataset[2]["prompt"] == rows[1]["prompt"]  # the parts of TRL's format
    assert _trainer(dataset, tmp_path).train().training_loss > 0
    unable = ActiveDPOSelector(with_lora(tiny_vlm()), tokenizer, strategy="activedpo")
    with pytest.raises(ActiveDPOError, match="the pool has images: pass the model's processor"):
        unable.select(pool, 1)


# -- features --------------------------------------------------------------------------------------


def _collated(trainer: Any, row: dict[str, Any]) -> Any:
    return trainer.data_collator([dict(row)])


@pytest.mark.parametrize(
    ("arch", "kwargs"),
    slow_except(
        [("llava", {"style": "brief"}), ("qwen", {})], product(ARCHS, [{}, {"style": "brief"}])
    ),
)
def test_tokens_and_pixels_are_those_of_trl(
    arch: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    pool = PreferencePool.from_rows(_rows(tmp_path))
    ours = tokenize_pool(pool, tiny_processor(arch), max_length=None, chat_template_kwargs=kwargs)
    assert ours.has_images and not ours.skipped
    options = {"chat_template_kwargs": kwargs} if kwargs else {}
    picked = _selector("random", arch, max_length=None, **options).select(pool, 4)
    trainer = _trainer(picked.to_dataset([0] * 4), tmp_path, arch)
    for pick, row in zip(picked, trainer.train_dataset, strict=True):
        collated = _collated(trainer, row)
        for which, number in enumerate(pick.pair):
            sequence = ours.sequences[2 * pool.position(pick.id) + number]
            real = collated["attention_mask"][which].bool()
            assert collated["input_ids"][which][real].tolist() == list(sequence.input_ids)
            scored = collated["completion_mask"][which][real].tolist()
            start = sequence.completion_start
            assert scored == [int(n >= start) for n in range(len(sequence.input_ids))]
            assert sequence.images is not None
            inputs = sequence.images.model_inputs(len(sequence.input_ids))
            others = {"input_ids", "attention_mask", "completion_mask"}
            assert inputs.keys() == collated.keys() - others
            for name, value in inputs.items():
                theirs = collated[name].chunk(2)[which]
                if name == "mm_token_type_ids":
                    theirs = theirs[:, : value.shape[1]]
                assert torch.equal(value, theirs)


def test_a_part_of_a_pool_is_tokenized_as_the_pool(tmp_path: Path) -> None:
    """A process of several may have the items without images alone."""
    pool = PreferencePool.from_rows(_rows(tmp_path))
    processor = tiny_processor()
    whole = tokenize_pool(pool, processor, max_length=None).sequences[4:6]
    part = tokenize_pool(pool[2:3], processor, max_length=None, with_images=True).sequences
    assert [s.input_ids for s in part] == [s.input_ids for s in whole]
    assert all(s.images is not None and not s.images.images for s in part)
    with pytest.raises(ActiveDPOError, match="the pool has images: pass"):
        tokenize_pool(pool[2:3], processor.tokenizer, with_images=True)


def _autograd(arch: str, model: Any, pool: PreferencePool) -> tuple[torch.Tensor, torch.Tensor]:
    """β ∇ log π(y|x) and log π(y|x), by one plain pass of the processor's own inputs each."""
    processor = tiny_processor(arch)
    rows, logps = [], []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for item in pool:
        images = [PIL.open(image) for image in images_of(item.prompt)]
        prompt = "".join(
            f"<|im_start|>{m['role']}\n"
            + (
                m["content"]
                if isinstance(m["content"], str)
                else "".join(part.get("text", PLACE[arch]) for part in m["content"])
            )
            + "<|im_end|>\n"
            for m in item.prompt
        )
        prompt += "<|im_start|>assistant\n"
        for response in item.responses:
            content = response[0]["content"]
            text = content if isinstance(content, str) else content[0]["text"]
            whole = processor(
                text=[f"{prompt}{text}<|im_end|>\n"],
                images=[images] if images else None,
                return_tensors="pt",
            )
            tail = processor.tokenizer(f"{text}<|im_end|>\n")["input_ids"]
            logits = model(**whole).logits[0, -len(tail) - 1 : -1].double()
            logp = logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum()
            gradients = torch.autograd.grad(
                logp, parameters, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
            logps.append(logp.detach())
    return torch.stack(rows), torch.stack(logps)


@pytest.mark.parametrize(
    ("arch", "trains"),
    slow_except(
        [("llava", "language model"), ("qwen", "all")], product(ARCHS, ["language model", "all"])
    ),
)
def test_features_are_exact(
    arch: str, trains: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With adapters on the language model by hooks; on the vision tower, too, by autograd."""
    targets = {"all": r".*\.(q_proj|v_proj|linear_1|qkv)"}.get(trains)
    model = with_lora(tiny_vlm(arch, torch.float64), *([targets] if targets else []))
    pool = PreferencePool.from_rows(_rows(tmp_path))
    expected, expected_logps = _autograd(arch, model, pool)
    tokens = tokenize_pool(pool, tiny_processor(arch))
    extractor = FeatureExtractor(model, Sketch("none"), beta=1.0, pad_token_id=1)
    inner = model.get_base_model().model
    if arch == "qwen":  # it remembers where the tokens of its last text began
        inner.rope_deltas = torch.tensor([[5]])
    found = extractor.gradients(tokens)
    assert arch != "qwen" or inner.rope_deltas.tolist() == [[5]]
    by_autograd = "gradients are from autograd" in caplog.text
    assert by_autograd == (trains == "all")
    assert torch.allclose(found.logps, expected_logps, rtol=1e-6)
    error = (found.gradients - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 1e-5
    assert torch.allclose(extractor.logps(tokens), expected_logps, rtol=1e-6)
    relative = extractor.gradients(tokens, relative=True).gradients
    assert torch.allclose(relative[1::2], expected[1::2] - expected[::2], atol=1e-4)
    assert extractor.hidden(tokens).shape == (8, 32)


def test_what_images_do_not_do(tmp_path: Path) -> None:
    pool = PreferencePool.from_rows(_rows(tmp_path))
    for options in ({"gradient": "response_tokens"}, {"preselect": 1}):
        with pytest.raises(ActiveDPOError, match="'response_tokens' is for texts alone"):
            _selector("activedpo", **options).select(pool, 1)


def test_the_image_is_in_the_feature(tmp_path: Path) -> None:
    """The same question and answers about another image have other rows."""
    base = {"prompt": _ask("A cat?"), "chosen": _say("yes"), "rejected": _say("no")}
    pool = PreferencePool.from_rows([{**base, "id": str(n), "image": picture(n)} for n in (0, 1)])
    tokens = tokenize_pool(pool, tiny_processor())
    assert tokens.sequences[0].input_ids == tokens.sequences[2].input_ids
    assert len(set(token_hashes(tokens).tolist())) == 2
    extractor = FeatureExtractor(with_lora(tiny_vlm()), Sketch("sjlt", 64))
    rows = extractor.gradients(tokens).gradients
    assert float((rows[0] - rows[2]).norm()) > 0.01 * float(rows[0].norm())
    # A pool of texts afterward is not held back by what was found out about images.
    texts = PreferencePool.from_rows([{**base, "id": "text"}, {**base, "prompt": _ask("A dog?")}])
    again = extractor.gradients(tokenize_pool(texts, tiny_processor()))
    fresh = FeatureExtractor(with_lora(tiny_vlm()), Sketch("sjlt", 64))
    assert torch.equal(
        again.gradients, fresh.gradients(tokenize_pool(texts, tiny_processor())).gradients
    )
    assert extractor.check(tokenize_pool(texts, tiny_processor())) == fresh.check(
        tokenize_pool(texts, tiny_processor())
    )


def test_strategies_that_use_the_model(tmp_path: Path) -> None:
    pool = PreferencePool.from_rows(_rows(tmp_path))
    for strategy in ("apo", "adpo_plus"):
        picked = _selector(strategy).select(pool, 2)
        assert len(picked) == 2
        following = _selector(strategy).select(pool[:3], 2, labeled=picked)
        assert not {pick.id for pick in following} & {pick.id for pick in picked}


def test_prompts_that_fill_the_length_are_not_picked(tmp_path: Path) -> None:
    pool = PreferencePool.from_rows(_rows(tmp_path))
    tokens = tokenize_pool(pool, tiny_processor(), max_length=24)
    kept = [item.id for n, item in enumerate(pool) if n not in tokens.skipped]
    assert 0 < len(kept) < 4
    picked = _selector("activedpo", max_length=24).select(pool, 4)
    assert {pick.id for pick in picked} == set(kept)
    with pytest.raises(ActiveDPOError, match="'keep_end' would cut images"):
        tokenize_pool(pool, tiny_processor(), max_length=24, truncation_mode="keep_end")


def test_what_cannot_be_tokenized(tmp_path: Path) -> None:
    base = {"chosen": _say("yes"), "rejected": _say("no")}
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    file = picture_file(tmp_path, 0)
    for row, fault in (
        ({"prompt": _ask("What?"), "image": str(tmp_path / "none.png")}, "there is no image file"),
        ({"prompt": _ask("What?"), "image": str(broken)}, "cannot be read as an image"),
        ({"prompt": _ask("What?"), "image": "data:image/png;base64,???"}, "no base64"),
        ({"prompt": _ask("<image> What?"), "image": file}, "LlavaProcessor refuses it"),
        (
            {"prompt": [*_ask("What?"), {"role": "critic", "content": "x"}], "image": file},
            "'critic'",
        ),
        (
            {"prompt": [*_ask("What?"), {"role": "system", "content": "x"}], "image": file},
            "ends wi",
        ),
    ):
        pool = PreferencePool.from_rows([{**base, **row, "id": "a"}])
        with pytest.raises(ActiveDPOError, match=f"^item 'a': .*{fault}") as error:
            tokenize_pool(pool, tiny_processor())
        assert "\n" not in str(error.value)
    pool = PreferencePool.from_rows([{**base, "prompt": _ask("What?"), "image": file}])
    tools = {"tools": [{"name": "f"}]}
    with pytest.raises(ActiveDPOError, match="DPOTrainer leaves out"):
        tokenize_pool(pool, tiny_processor(), chat_template_kwargs=tools)


def test_texts_alone_with_a_processor(tmp_path: Path) -> None:
    """As DPOTrainer tokenizes a data set without images with a processor."""
    rows = [
        {name: row[name] for name in ("prompt", "chosen", "rejected")} for row in _rows(tmp_path)
    ]
    pool = PreferencePool.from_rows([rows[2], {**rows[3], "prompt": _ask("Color?")}])
    ours = tokenize_pool(pool, tiny_processor(), max_length=None)
    assert not ours.has_images
    picked = _selector("random", max_length=None).select(pool, 2)
    trainer = _trainer(picked.to_dataset([0, 0]), tmp_path)
    for pick, row in zip(picked, trainer.train_dataset, strict=True):
        for name, number in zip(("chosen_ids", "rejected_ids"), pick.pair, strict=True):
            sequence = ours.sequences[2 * pool.position(pick.id) + number]
            assert row["prompt_ids"] + row[name] == list(sequence.input_ids)
    with pytest.raises(ActiveDPOError, match="is a processor, and the texts are plain"):
        plain = PreferencePool.from_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        tokenize_pool(plain, tiny_processor())


# -- labels ----------------------------------------------------------------------------------------


def test_a_judge_does_not_judge_what_it_cannot_see(tmp_path: Path) -> None:
    pool = PreferencePool.from_rows(_rows(tmp_path)[:2])
    picked = _selector("random").select(pool, 1)
    judge = JudgeOracle("m", base_url="http://127.0.0.1:9/v1", journal=tmp_path / "j.jsonl")
    with pytest.raises(ActiveDPOError, match="the prompt has images, and the judge"):
        judge.label(picked)


def test_a_prompt_that_ends_with_the_assistant_is_continued(tmp_path: Path) -> None:
    """As DPOTrainer's collator continues it; a changed file is read again."""
    file = picture_file(tmp_path, 0)
    row = {
        "id": "a",
        "prompt": [*_ask("What?"), *_say("It is")],
        "images": [file],
        "chosen": _say(" a cat."),
        "rejected": _say(" a dog."),
    }
    pool = PreferencePool.from_rows([row])
    processor = tiny_processor()
    first, _ = tokenize_pool(pool, processor, max_length=None).sequences
    picked = _selector("random", max_length=None).select(pool, 1)
    trainer = _trainer(picked.to_dataset([picked[0].pair.index(0)]), tmp_path)
    collated = _collated(trainer, trainer.train_dataset[0])
    real = collated["attention_mask"][0].bool()
    assert collated["input_ids"][0][real].tolist() == list(first.input_ids)
    assert first.images is not None
    before = first.images.model_inputs(len(first.input_ids))["pixel_values"]
    picture(9).save(file)
    again, _ = tokenize_pool(pool, processor, max_length=None).sequences
    assert again.images is not None
    assert not torch.equal(before, again.images.model_inputs(len(again.input_ids))["pixel_values"])
