"""The command line on real files: tiny models saved to disk, read back by the commands."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import activedpo_fast
from activedpo_fast.cli import features as features_command
from activedpo_fast.cli import select as select_command
from activedpo_fast.cli.app import main
from activedpo_fast.gradients import extractor
from activedpo_fast.labels import RewardModel
from activedpo_fast.labels.page.session import Session
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.selection.signals import TensorSignals
from activedpo_fast.selection.strategies import make_strategy
from activedpo_fast.selector import ActiveDPOSelector
from activedpo_fast.store.store import FeatureStore
from activedpo_fast.training.run_folder import read_command
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.labeling import open_labeling
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.rehearsals import rehearsed_once  # noqa: F401

_WORDS = "label prefer model align choose respond sketch brown fox lazy dog people".split()


def _rows(n: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def words(least: int, most: int) -> str:
        count = int(torch.randint(least, most + 1, (), generator=generator))
        chosen = torch.randint(len(_WORDS), (count,), generator=generator)
        return " ".join(_WORDS[i] for i in chosen)

    return [
        {
            "id": f"p{i}",
            "prompt": words(2, 6) + "?",
            "responses": [f" {words(1, 8)} {j}" for j in range(2 + i % 3)],
            "topic": ("law", "math")[i % 2],
            "price": 1 + i % 3,
            "alike": [1] * (2 + i % 3),
            "quality": [0.3 * i - 0.7 * j * j for j in range(2 + i % 3)],
        }
        for i in range(n)
    ]


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, adapter/ and pool.jsonl. Tests must not change it."""
    folder = tmp_path_factory.mktemp("project")
    base = tiny_causal_lm("llama")
    base.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lora(base, "llama").save_pretrained(folder / "adapter")
    _write_jsonl(folder / "pool.jsonl", _rows())
    return folder


@pytest.fixture(scope="module")
def store(project: Path) -> Path:
    """A complete store of the project's pool. Tests must not change it."""
    assert main([*_features(project, project / "store"), "--proj-dim", "64"]) == 0
    return project / "store"


def _features(project: Path, output: Path, **replaced: Path) -> list[str]:
    paths = {
        "pool": project / "pool.jsonl",
        "model": project / "model",
        "adapter": project / "adapter",
        **replaced,
    }
    return [
        "features",
        str(paths["pool"]),
        "--model",
        str(paths["model"]),
        "--adapter",
        str(paths["adapter"]),
        "--output",
        str(output),
        "--threads",
        "1",
    ]


def _policy(project: Path) -> tuple[PeftModel, Any]:
    base = AutoModelForCausalLM.from_pretrained(project / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, project / "adapter", is_trainable=True)
    return model.eval(), AutoTokenizer.from_pretrained(project / "model")


def _refused(capsys: pytest.CaptureFixture[str], argv: list[str], *expected: str) -> None:
    """Assert exit code 2 and one line on stderr that has all of `expected`."""
    capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("activedpo: error: "), captured.err
    for part in expected:
        assert part in lines[0]
    assert captured.out == ""


# -- features --------------------------------------------------------------------------------------


def test_exported_exact_rows_are_those_of_a_float64_loop(project: Path, tmp_path: Path) -> None:
    export = tmp_path / "features.safetensors"
    argv = [
        *_features(project, tmp_path / "store"),
        "--sketch",
        "none",
        "--beta",
        "0.3",
        "--export",
        str(export),
    ]
    assert main(argv) == 0

    model, tokenizer = _policy(project)
    model.double()
    pool = PreferencePool.load(project / "pool.jsonl")
    sequences = tokenize_pool(pool, tokenizer, show_progress=False).sequences
    expected, _ = loop_gradients(model, sequences, trainable(model))
    features = load_file(export)["features"]
    assert features.dtype == torch.float32
    assert features.shape == expected.shape
    assert relative_error(features, 0.3 * expected) < 1e-5


def test_interrupted_features_are_continued_to_the_same_rows(
    project: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [
        *_features(project, tmp_path / "store"),
        "--proj-dim",
        "64",
        "--max-tokens-per-batch",
        "40",
    ]
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    assert main([*argv, "--output", str(tmp_path / "other"), "--export", str(whole)]) == 0

    real, calls = extractor.captured_rows, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(extractor, "captured_rows", interrupted)
        capsys.readouterr()
        assert main(argv) == 130
    assert capsys.readouterr().err == "activedpo: interrupted\n"
    assert len(list((tmp_path / "store").glob("rows-*.partial"))) == 1
    _refused(
        capsys,
        ["select", str(tmp_path / "store"), "--output", str(tmp_path / "x.jsonl")],
        "incomplete",
        "activedpo features",
    )

    assert main([*argv, "--export", str(resumed)]) == 0
    assert "rows already exist" in capsys.readouterr().err
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_complete_store_is_left_alone_but_exported(
    project: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    monkeypatch.setattr(features_command, "load_policy", None)  # no model is needed
    export = tmp_path / "features.safetensors"
    argv = [*_features(project, store), "--proj-dim", "64", "--export", str(export)]
    capsys.readouterr()
    assert main(argv) == 0
    assert "complete already" in capsys.readouterr().out
    assert load_file(export)["features"].shape == (len(_all_responses()), 64)
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == before


def _all_responses() -> list[str]:
    return [response for row in _rows() for response in row["responses"]]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--beta", "0.2"], "beta"),
        (["--proj-dim", "32"], "proj_dim"),
        (["--sketch", "rademacher"], "sketch"),
        (["--sketch", "none"], "sketch = 'sjlt', not 'none'"),
        (["--seed", "1"], "seed"),
        (["--last-layers", "1"], "last_layers"),
        (["--max-length", "0"], "max_length"),
        (["--truncation-mode", "keep_end"], "truncation_mode"),
        (["--dtype", "bfloat16"], "dtype"),
    ],
)
def test_other_settings_on_the_same_store_are_refused(
    project: Path, store: Path, options: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*_features(project, store), "--proj-dim", "64", *options]
    _refused(capsys, argv, "was made with", name, "choose another path")


def test_another_adapter_model_or_pool_on_the_same_store_is_refused(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "project"
    shutil.copytree(project, own, ignore=shutil.ignore_patterns("store"))
    argv = _features(own, own / "rows")
    assert main(argv) == 0

    _write_jsonl(own / "pool.jsonl", _rows(seed=1))
    _refused(capsys, argv, "another pool")
    _write_jsonl(own / "pool.jsonl", _rows())

    for weights, setting in (
        (own / "adapter" / "adapter_model.safetensors", "another adapter"),
        (own / "model" / "model.safetensors", "another model"),
    ):
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit of a weight
        _refused(capsys, argv, f"made with {setting}", "has changed since")
        weights.write_bytes(content)
    assert main(argv) == 0
    other = tmp_path / "other"
    shutil.copytree(own / "model", other)
    (other / "config.json").write_text((own / "model" / "config.json").read_text() + " ")
    _refused(
        capsys,
        _features(own, own / "rows", model=other),
        f"another model ('{own / 'model'}', not '{other}')",
    )


def test_files_that_moved_are_continued(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "project"
    shutil.copytree(project, own, ignore=shutil.ignore_patterns("store"))
    assert main(_features(own, tmp_path / "rows")) == 0
    own.rename(tmp_path / "moved")
    assert main(_features(tmp_path / "moved", tmp_path / "rows")) == 0
    assert "complete already" in capsys.readouterr().out


def test_outputs_that_cannot_be_written_are_refused_first(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(features_command, "load_policy", None)  # the model is not loaded needlessly
    file = tmp_path / "file"
    file.write_text("mine")
    _refused(capsys, _features(project, file), f"{file} is a file, not a folder to write to")
    _refused(capsys, _features(project, file / "store"), f"{file} is not a writable folder")
    config = tmp_path / "run.yaml"
    for folder in (file, file / "run"):
        config.write_text(
            yaml.safe_dump(
                {
                    "model": str(project / "model"),
                    "adapter": str(project / "adapter"),
                    "prompts": str(project / "pool.jsonl"),
                    "output_dir": str(folder),
                    "oracle": {"kind": "people", "via": "files"},
                }
            )
        )
        _refused(capsys, ["run", str(config)], str(folder), "writ")
    assert file.read_text() == "mine" and sorted(tmp_path.iterdir()) == [file, config]


def test_an_incomplete_tokenizer_is_named(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(project / "adapter", adapter)
    shutil.copy(project / "model" / "tokenizer_config.json", adapter)
    _refused(
        capsys,
        _features(project, tmp_path / "store", adapter=adapter),
        f"{adapter} has no tokenizer that can be loaded: none of the files",
    )


def test_prompts_that_fill_max_length_are_not_candidates(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _rows(3)
    rows[1]["prompt"] = "a very long prompt " * 20
    pool = _write_jsonl(tmp_path / "pool.jsonl", rows)
    argv = [*_features(project, tmp_path / "store", pool=pool), "--max-length", "48"]
    assert main(argv) == 0
    assert "1 prompts too long" in capsys.readouterr().out
    picked = tmp_path / "picked.jsonl"
    candidates = 1 + 6  # the rows of items 0 and 2, which have two and four responses
    select = ["select", str(tmp_path / "store"), "--output", str(picked), "--pairs"]
    assert main([*select, str(candidates)]) == 0
    assert {line["id"] for line in _read_jsonl(picked)} == {"p0", "p2"}
    picks = picked.read_bytes()
    assert main([*select, str(candidates + 1)]) == 0
    assert picked.read_bytes() == picks
    assert "7 pairs are picked instead of 8" in capsys.readouterr().err
    known = [{"id": id_, "pair": [0, 1], "label": 0} for id_ in ("p1", "p2")]
    known_file = _write_jsonl(tmp_path / "known.jsonl", known)
    select[3] = str(tmp_path / "others.jsonl")
    assert main([*select, "6", "--labeled", str(known_file)]) == 0
    said = capsys.readouterr()
    assert "1 labeled pairs are of items that were left out as too long" in said.err
    assert "6 of 6 candidate pairs and 1 labeled picked" in said.out
    labels = _write_jsonl(tmp_path / "l.jsonl", [{**p, "label": 0} for p in _read_jsonl(picked)])
    select = ["select", str(tmp_path / "store"), "--output", str(tmp_path / "none.jsonl")]
    said = "no pair is left to pick: every pair was asked before"
    _refused(capsys, [*select, "--labeled", str(labels)], said)
    said = "no pair is left to pick: none of the 7 candidate pairs reaches --min-score"
    _refused(capsys, [*select, "--pairs=7", "--min-score=1e9"], said)
    assert not (tmp_path / "none.jsonl").exists()


def test_parquet_pool_gives_the_same_rows(project: Path, store: Path, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(_rows()).to_parquet(tmp_path / "pool.parquet")
    argv = _features(project, tmp_path / "store", pool=tmp_path / "pool.parquet")
    export = tmp_path / "features.safetensors"
    assert main([*argv, "--proj-dim", "64", "--export", str(export)]) == 0
    assert (
        main(
            [
                *_features(project, store),
                "--proj-dim",
                "64",
                "--export",
                str(tmp_path / "jsonl.safetensors"),
            ]
        )
        == 0
    )
    assert torch.equal(
        load_file(export)["features"], load_file(tmp_path / "jsonl.safetensors")["features"]
    )


# -- select ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "response", "lam": 1.0, "kappa": 1.0},
        {"normalize": "pair", "lam": 0.5, "kappa": 1.0},
        {"normalize": "none", "lam": 1e-3, "kappa": 2.0},
    ],
)
def test_picks_are_those_of_the_selector(
    project: Path, store: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model, tokenizer = _policy(project)
    pool = PreferencePool.load(project / "pool.jsonl")
    selector = ActiveDPOSelector(model, tokenizer, proj_dim=64, **options)
    argv = [
        "select",
        str(store),
        "--pairs",
        "6",
        "--normalize",
        options["normalize"],
        "--lam",
        str(options["lam"]),
        "--kappa",
        str(options["kappa"]),
    ]

    first = selector.select(pool, 6, show_progress=False)
    assert main([*argv, "--output", str(tmp_path / "1.jsonl")]) == 0
    _assert_same_picks(_read_jsonl(tmp_path / "1.jsonl"), first)

    second = selector.select(pool, 6, labeled=first, show_progress=False)
    labels = _write_jsonl(
        tmp_path / "labels.jsonl",
        [{**line, "label": 1} for line in _read_jsonl(tmp_path / "1.jsonl")],
    )
    assert main([*argv, "--labeled", str(labels), "--output", str(tmp_path / "2.jsonl")]) == 0
    _assert_same_picks(_read_jsonl(tmp_path / "2.jsonl"), second)


def _assert_same_picks(lines: list[dict[str, Any]], expected: Selection) -> None:
    assert [line["rank"] for line in lines] == list(range(len(expected)))
    for line, pick in zip(lines, expected, strict=True):
        assert set(line) == {"id", "pair", "score", "rank", "prompt", "responses"}
        assert (line["id"], tuple(line["pair"])) == (pick.id, pick.pair)
        assert (line["prompt"], tuple(line["responses"])) == (pick.prompt, pick.responses)
        assert line["score"] == pytest.approx(pick.score, rel=1e-4)
    scores = [line["score"] for line in lines]
    assert scores == sorted(scores, reverse=True)  # gains only shrink within a batch


@pytest.mark.parametrize("last_layers", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_two_stores_are_the_two_stages_of_the_selector(
    last_layers: int | None,
    project: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cheap = str(tmp_path / "cheap")
    argv = [*_features(project, tmp_path / "cheap"), "--proj-dim", "64"]
    layers = [] if last_layers is None else ["--last-layers", str(last_layers)]
    assert main([*argv, "--gradient", "response_tokens", *layers]) == 0
    model, tokenizer = _policy(project)
    pool = PreferencePool.load(project / "pool.jsonl")
    one = ActiveDPOSelector(model, tokenizer, proj_dim=64).select(pool, 4)
    two = ActiveDPOSelector(model, tokenizer, proj_dim=64, preselect=1, last_layers=last_layers)
    labels = _write_jsonl(
        tmp_path / "labels.jsonl",
        [{"id": pick.id, "pair": list(pick.pair), "label": 0} for pick in one],
    )
    expected = two.select(pool, 8, labeled=one)
    chosen = ["select", str(store), "--pairs", "8", "--labeled", str(labels)]
    stages = ["--preselect", "1", "--preselect-by", cheap]
    for name, limit in (("memory", 2**30), ("disk", 0)):
        monkeypatch.setattr(select_command, "_IN_MEMORY_BYTES", limit)
        assert main([*chosen, *stages, "--output", str(tmp_path / name)]) == 0
        _assert_same_picks(_read_jsonl(tmp_path / name), expected)
    assert main([*chosen, "--output", str(tmp_path / "exact")]) == 0
    assert _read_jsonl(tmp_path / "exact") != _read_jsonl(tmp_path / "memory")
    everything = ["--preselect", "1000", "--preselect-by", cheap]
    assert main([*chosen, *everything, "--output", str(tmp_path / "all")]) == 0
    assert (tmp_path / "all").read_bytes() == (tmp_path / "exact").read_bytes()

    other = _write_jsonl(tmp_path / "other.jsonl", _rows(3))
    assert main([*_features(project, tmp_path / "other", pool=other), "--proj-dim", "64"]) == 0
    small, stale = tmp_path / "short", tmp_path / "stale"
    assert main([*_features(project, small), "--proj-dim", "64", "--max-length", "10"]) == 0
    adapter = lora(tiny_causal_lm("llama"), "llama", seed=5)
    adapter.save_pretrained(tmp_path / "adapter")
    argv = _features(project, stale, adapter=tmp_path / "adapter")
    assert main([*argv, "--proj-dim", "64", "--gradient", "response_tokens"]) == 0
    swapped = ["select", cheap, "--preselect=2", f"--preselect-by={store}", "--output=x.jsonl"]
    _refused(capsys, swapped, "has cheaper rows than", "--preselect-by takes the cheaper ones")
    chosen += ["--output", str(tmp_path / "refused")]
    for more, expected_words in (
        (["--preselect", "2"], "--preselect-by"),
        (["--preselect-by", cheap], "--preselect INTEGER"),
        (["--preselect", "0", "--preselect-by", cheap], "--preselect: 0 is below 1"),
        ([*stages, "--strategy", "trace"], "the strategy 'trace'"),
        (["--preselect", "2", "--preselect-by", str(tmp_path / "other")], "rows of another pool"),
        (["--preselect", "2", "--preselect-by", str(small)], "rows of other tokens"),
        (["--preselect", "2", "--preselect-by", str(stale)], "rows of another model or adapter"),
    ):
        _refused(capsys, [*chosen, *more], expected_words)
    assert not (tmp_path / "refused").exists()


def test_rows_that_stay_on_disk_give_the_same_file(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = _write_jsonl(tmp_path / "labels.jsonl", [{"id": "p2", "pair": [0, 3], "label": 0}])
    for strategy in ("activedpo", "trace", "random"):
        argv = [
            "select",
            str(store),
            "--pairs",
            "9",
            "--labeled",
            str(labels),
            "--strategy",
            strategy,
            "--output",
        ]
        assert main([*argv, str(tmp_path / "memory.jsonl")]) == 0
        with monkeypatch.context() as patch:
            patch.setattr(select_command, "_IN_MEMORY_BYTES", 0)
            assert main([*argv, str(tmp_path / "disk.jsonl")]) == 0
        memory, disk = (_read_jsonl(tmp_path / f"{name}.jsonl") for name in ("memory", "disk"))
        assert [line.pop("score") for line in disk] == pytest.approx(
            [line.pop("score") for line in memory], rel=1e-10
        )
        assert disk == memory

    # The same without a command. Nothing is labeled, so the history has no rows.
    rows = FeatureStore.open(store)
    pool = rows.pool()
    item_of_row = torch.repeat_interleave(torch.arange(len(pool)), pool.response_offsets.diff())
    rankings = [
        make_strategy("activedpo").select(
            TensorSignals(pool.pairs(), item_of_row, gradients=gradients), 9
        )
        for gradients in (rows.load().gradients, rows.rows_on_disk())
    ]
    assert rankings[0].indices.tolist() == rankings[1].indices.tolist()


def test_labeled_pairs_are_left_out_and_change_the_picks(store: Path, tmp_path: Path) -> None:
    everything = tmp_path / "all.jsonl"
    select = ["select", str(store), "--pairs"]
    assert main([*select, "5", "--output", str(everything)]) == 0
    before = [(line["id"], tuple(line["pair"])) for line in _read_jsonl(everything)]
    scores = [line["score"] for line in _read_jsonl(everything)]

    # Only id, pair and label are needed, in either order.
    (first, pair), (second, other) = before[:2]
    labels = _write_jsonl(
        tmp_path / "labels.jsonl",
        [
            {"id": first, "pair": list(pair), "label": 1},
            {"id": second, "pair": list(other[::-1]), "label": 0},
        ],
    )
    after = tmp_path / "after.jsonl"
    assert main([*select, "5", "--labeled", str(labels), "--output", str(after)]) == 0
    lines = _read_jsonl(after)
    picked = [(line["id"], tuple(line["pair"])) for line in lines]
    assert not set(before[:2]) & set(picked)
    # Greedy: with the first two in V, the remainder of the first answer comes next.
    assert picked[:3] == before[2:]
    assert [line["score"] for line in lines[:3]] == pytest.approx(scores[2:], rel=1e-6)


def test_pairs_without_a_preference_are_left_out_but_do_not_enter_v(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select = ["select", str(store), "--pairs"]
    assert main([*select, "8", "--lam", "1000", "--output", str(tmp_path / "a.jsonl")]) == 0
    # With such a large λ, V hardly changes: pairs are ranked one by one, whatever is in V.
    (first, *others) = _read_jsonl(tmp_path / "a.jsonl")
    for answer in ({"label": None}, {}, {"label": "skip"}, {"label": "tie"}):
        labels = _write_jsonl(tmp_path / "labels.jsonl", [{**first, **answer}])
        capsys.readouterr()
        assert (
            main([*select, "1", "--labeled", str(labels), "--output", str(tmp_path / "b.jsonl")])
            == 0
        )
        pending = f"activedpo: {labels}: 1 of 1 pairs have no label yet: they are not picked again"
        assert (pending in capsys.readouterr().err) == (answer.get("label") is None)
        assert main([*select, "1", "--output", str(tmp_path / "c.jsonl")]) == 0
        (undecided,) = _read_jsonl(tmp_path / "b.jsonl")
        (free,) = _read_jsonl(tmp_path / "c.jsonl")
        assert (undecided["id"], undecided["pair"]) == (others[0]["id"], others[0]["pair"])
        # λ = 1 and an empty V: the score is ‖φ‖², like that of the free choice, and 1000 times the
        # score with λ = 1000.
        assert undecided["score"] == pytest.approx(1000 * others[0]["score"], rel=5e-3)
        assert free["score"] == pytest.approx(1000 * first["score"], rel=1e-6)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "p0", "pair": [0, 1], "label": 2}', "'label' must be 0, 1, \"skip\""),
        ('{"id": "p0", "pair": [0, 1], "label": true}', "'label' must be 0, 1, \"skip\""),
        ('{"id": "p0", "pair": [0, 1]', "broken JSON"),
        ('["p0", [0, 1]]', "not a JSON object"),
        ('{"pair": [0, 1]}', "no 'id'"),
        ('{"id": "p0"}', "no 'pair'"),
        ('{"id": "zz", "pair": [0, 1]}', "no item with id 'zz'"),
        ('{"id": "p0", "pair": [0, 0]}', "two different"),
        ('{"id": "p0", "pair": [0, true]}', "two different"),
        ('{"id": "p0", "pair": [0, 2]}', "has 2 responses"),
        ('{"id": "p0", "pair": [-1, 0]}', "has 2 responses"),
        ('{"id": "p1", "pair": [1, 0]}', "the same pair as"),
        ('{"id": "p0", "pair": [0, 1], "prompt": "another"}', "'prompt' is not that of item 'p0'"),
        ('{"id": "p0", "pair": [0, 1], "responses": ["a", "b"]}', "'responses' is not that of"),
    ],
)
def test_bad_labels_are_refused_by_line(
    store: Path, tmp_path: Path, line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"id": "p1", "pair": [0, 1]}\n' + line + "\n")
    output = tmp_path / "picked.jsonl"
    _refused(
        capsys,
        ["select", str(store), "--labeled", str(labels), "--output", str(output)],
        f"{labels}, line 2",
        expected,
    )
    assert not output.exists()


def test_random_strategy_is_seeded(store: Path, tmp_path: Path) -> None:
    argv = ["select", str(store), "--pairs", "6", "--strategy", "random", "--output"]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([*argv, str(tmp_path / name), "--seed", seed]) == 0
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert a == b != c


def test_settings_that_a_strategy_does_not_have_are_named(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["select", str(store), "--pairs", "2", "--strategy", "random", "--output"]
    assert main([*argv, str(tmp_path / "a")]) == 0
    assert "has no effect" not in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "b"), "--lam", "3", "--normalize", "pair"]) == 0
    warned = capsys.readouterr().err
    assert "lam=3.0 has no effect: strategy 'random'" in warned
    assert "normalize=pair has no effect: strategy 'random'" in warned
    assert "kappa" not in warned
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_picks_by_rewards_of_the_pool(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "picked.jsonl"
    argv = ["select", str(store), "--pairs", "5", "--output", str(output), "--quiet"]
    assert main([*argv, "--strategy", "reward_gap", "--reward-column", "quality"]) == 0
    gaps = {
        (row["id"], a, b): abs(row["quality"][a] - row["quality"][b])
        for row in _rows()
        for a, b in itertools.combinations(range(len(row["responses"])), 2)
    }
    best = sorted(gaps.values(), reverse=True)[:5]
    picks = _read_jsonl(output)
    assert [pick["score"] for pick in picks] == best
    assert [gaps[(pick["id"], *pick["pair"])] for pick in picks] == best
    output.unlink()
    _refused(capsys, [*argv, "--strategy", "reward_gap"], "item 'p0' has no column 'rewards'")
    _refused(
        capsys,
        [*argv, "--reward-column", "quality"],
        "--reward-column: the strategy activedpo reads no rewards",
    )
    _refused(
        capsys,
        [*argv, "--strategy", "reward_gap", "--reward-column", "alike"],
        "all scores are 0, every pair's two responses have the same reward",
    )
    assert not output.exists()


@pytest.fixture(scope="module")
def without_rules(project: Path) -> Selection:
    """What the selector picks of the project's pool."""
    selector = ActiveDPOSelector(*_policy(project), proj_dim=64)
    pool = PreferencePool.load(project / "pool.jsonl")
    return selector.select(pool, 8, show_progress=False)


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        pytest.param(["--max-per-prompt", "1"], {"max_per_prompt": 1}, marks=pytest.mark.slow),
        pytest.param(["--exclude", "{exclude}"], {"exclude": ["p1", "p5"]}, marks=pytest.mark.slow),
        (
            ["--group-by", "topic", "--quota", "law=1", "--quota", "math=3"],
            {"group_by": "topic", "quotas": {"law": 1, "math": 3}},
        ),
        (["--min-score", "1.6"], {"min_score": 1.6}),
        (["--random-fraction", "0.5", "--seed", "3"], {"random_fraction": 0.5, "seed": 3}),
        pytest.param(["--cost", "price"], {"cost": "price"}, marks=pytest.mark.slow),
        (
            [
                "--max-per-prompt",
                "2",
                "--exclude",
                "{exclude}",
                "--group-by",
                "topic",
                "--quota",
                "law=3",
                "--min-score",
                "0.1",
                "--random-fraction",
                "0.3",
                "--cost",
                "price",
            ],
            {
                "max_per_prompt": 2,
                "exclude": ["p1", "p5"],
                "group_by": "topic",
                "quotas": {"law": 3},
                "min_score": 0.1,
                "random_fraction": 0.3,
                "cost": "price",
            },
        ),
    ],
)
def test_rules_are_those_of_the_selector(
    project: Path,
    store: Path,
    without_rules: Selection,
    tmp_path: Path,
    options: list[str],
    rules: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "done.txt").write_text("p5\n\n p1 \n")
    options = [option.replace("{exclude}", str(tmp_path / "done.txt")) for option in options]
    model, tokenizer = _policy(project)
    pool = PreferencePool.load(project / "pool.jsonl")
    expected = ActiveDPOSelector(model, tokenizer, proj_dim=64).select(
        pool, 8, rules=PickRules(**rules), show_progress=False
    )
    assert expected != without_rules and len(expected) > 2  # the rules make a difference
    capsys.readouterr()
    argv = ["select", str(store), "--pairs", "8", "--output", str(tmp_path / "x.jsonl")]
    assert main([*argv, *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{len(expected)} of 24 candidate pairs picked by activedpo")
    fewer = [line for line in captured.err.splitlines() if "pairs picked" in line]
    if len(expected) < 8:
        assert len(fewer) == 1 and fewer[0].startswith(f"activedpo: {len(expected)} of 8 pairs")
    else:
        assert not fewer
    lines = _read_jsonl(tmp_path / "x.jsonl")
    assert [(line["id"], tuple(line["pair"])) for line in lines] == [
        (pick.id, pick.pair) for pick in expected
    ]
    assert [line["score"] for line in lines] == pytest.approx(
        [pick.score for pick in expected], rel=1e-4
    )


def test_select_identifies_prompts_by_text_and_not_by_row(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several rows of one prompt, as in comparison data, from a folder of shards."""
    rows = [
        {
            "id": f"c{n}",
            "prompt": f"Post {n % 2}:",
            "post": n % 3,
            "responses": [f" {_WORDS[n]}", f" b{n % 3}"],
        }
        for n in range(6)
    ]
    (tmp_path / "pool").mkdir()
    _write_jsonl(tmp_path / "pool" / "a.jsonl", rows)
    _write_jsonl(
        tmp_path / "pool" / "b.jsonl",
        [{**rows[0], "id": "again", "responses": rows[0]["responses"][::-1]}],
    )
    store = tmp_path / "store"
    assert main([*_features(project, store, pool=tmp_path / "pool"), "--proj-dim", "64"]) == 0
    argv = ["select", str(store), "--output", str(tmp_path / "x.jsonl"), "--pairs", "6"]

    def picked(*options: str) -> list[str]:
        assert main([*argv, *options]) == 0
        return [line["id"] for line in _read_jsonl(tmp_path / "x.jsonl")]

    capsys.readouterr()
    assert sorted(picked()) == [f"c{n}" for n in range(6)]
    assert "1 of 7 pairs have the prompt and responses of an earlier one" in capsys.readouterr().err
    for strategy in ("activedpo", "random"):
        one_each = picked("--max-per-prompt", "1", "--strategy", strategy)
        assert sorted(int(id[1:]) % 2 for id in one_each) == [0, 1]
        by_post = picked("--max-per-prompt", "1", "--prompt-by", "post", "--strategy", strategy)
        assert sorted(int(id[1:]) % 3 for id in by_post) == [0, 1, 2]
    (tmp_path / "done.txt").write_text("again\n")
    assert sorted(picked("--exclude", str(tmp_path / "done.txt"))) == ["c1", "c3", "c5"]
    labels = _write_jsonl(
        tmp_path / "labels.jsonl",
        [
            {
                "id": "of another pool",
                "pair": [1, 0],
                "label": 1,
                "prompt": rows[4]["prompt"],
                "responses": rows[4]["responses"][::-1],
            },
            {"id": "again", "pair": [0, 1], "label": 0},
        ],
    )
    left = picked("--labeled", str(labels), "--pairs", "4")
    assert sorted(left) == ["c1", "c2", "c3", "c5"]
    assert "of 4 candidate pairs and 2 labeled picked" in capsys.readouterr().out
    _refused(capsys, [*argv, "--prompt-by", "thread"], "prompt_by: item 'c0' has no 'thread'")


def test_rules_hold_for_random_picks_too(store: Path, tmp_path: Path) -> None:
    argv = [
        "select",
        str(store),
        "--pairs",
        "8",
        "--strategy",
        "random",
        "--output",
        str(tmp_path / "x.jsonl"),
    ]
    free = []
    for options in ([], ["--max-per-prompt", "1"]):
        assert main([*argv, *options, "--seed", "1"]) == 0
        free.append([line["id"] for line in _read_jsonl(tmp_path / "x.jsonl")])
    prompts = list(dict.fromkeys(free[0]))  # the same draws, except those that the rules exclude
    assert free[1][: len(prompts)] == prompts
    assert sorted(free[1]) == [f"p{i}" for i in range(8)]


def test_ids_to_exclude_must_be_of_the_pool(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "select",
        str(store),
        "--output",
        str(tmp_path / "x.jsonl"),
        "--pairs",
        "2",
        "--exclude",
        str(tmp_path / "done.txt"),
    ]
    (tmp_path / "done.txt").write_text("p1\np99\n")
    _refused(capsys, argv, "exclude: no item has the id 'p99'")
    (tmp_path / "done.txt").write_bytes(b"p1\n\xff\n")
    _refused(capsys, argv, "done.txt: not UTF-8")
    (tmp_path / "done.txt").write_text("".join(f"p{i}\n" for i in range(8)))
    _refused(capsys, argv, "the rules leave none of 24 candidate pairs")
    assert not (tmp_path / "x.jsonl").exists()


# -- run -------------------------------------------------------------------------------------------


def _run_config(project: Path, folder: Path, **changes: Any) -> Path:
    prompts = [{name: row[name] for name in ("id", "prompt", "topic")} for row in _rows()]
    _write_jsonl(folder / "prompts.jsonl", prompts)
    config: dict[str, Any] = {
        "model": str(project / "model"),
        "adapter": str(project / "adapter"),
        "prompts": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "selection": {"proj_dim": 32},
        "loop": {
            "rounds": 2,
            "batch_size": 2,
            "prompts_per_round": 3,
            "num_generations": 2,
            "max_completion_length": 4,
        },
        "dpo": {"learning_rate": 1e-3, "max_steps": 1, "per_device_train_batch_size": 2},
        "oracle": {"kind": "people", "via": "files"},
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def test_run_waits_for_labels_and_continues_with_them(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", str(_run_config(project, tmp_path))]
    filled: set[Path] = set()
    for waiting in (1, 2):
        for _ in range(2):  # running again changes nothing
            capsys.readouterr()
            assert main(argv) == 3
            captured = capsys.readouterr()
            (to_label,) = set((tmp_path / "run" / "labeling").iterdir()) - filled
            message = [line for line in captured.err.splitlines() if str(to_label) in line]
            assert len(message) == 1 and "error" not in message[0] and captured.out == ""
        lines = _read_jsonl(to_label)
        assert len(lines) == 2
        _write_jsonl(to_label, [{**line, "label": 0} for line in lines])
        filled.add(to_label)
        assert len(list((tmp_path / "run").glob("round-*/adapter"))) == waiting - 1
    capsys.readouterr()
    assert main(argv) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0][:2] == ["round", "labels"]
    assert [line[:2] for line in table[1:]] == [["start", "0"], ["0", "2"], ["1", "4"]]
    command = read_command(tmp_path / "run")
    assert command == f"cd {shlex.quote(str(Path.cwd()))} && activedpo {shlex.join(argv)}"
    start, end = (
        load_file(tmp_path / "run" / name / "adapter" / "adapter_model.safetensors")
        for name in ("start", "round-001")
    )
    assert any(not torch.equal(start[name], end[name]) for name in start)

    _run_config(project, tmp_path, selection={"proj_dim": 16})
    other = (tmp_path / "run.yaml").rename(tmp_path / "other.yaml")
    _refused(capsys, ["run", str(other)], "other settings", "proj_dim")
    assert read_command(tmp_path / "run") == command
    _run_config(project, tmp_path, rules={"max_per_prompt": 1})
    _refused(capsys, argv, "other settings", "rules")


def test_run_goes_on_with_labels_from_the_page(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = {"rounds": 1, "batch_size": 2, "prompts_per_round": 3, "num_generations": 2}
    argv = ["run", str(_run_config(project, tmp_path, loop=loop, oracle={"kind": "people"}))]
    assert main(argv) == 3
    (to_label,) = (tmp_path / "run" / "labeling").iterdir()
    assert f"2 of 2 pairs have no label yet: label them with `activedpo label {to_label}`" in (
        capsys.readouterr().err
    )
    session = Session(open_labeling(to_label), "ann")
    for missing in (1, 0):
        session.answer(session.current() or 0, "left", seconds=1)
        session.labeling.write_labels()
        assert main(argv) == (3 if missing else 0)
        assert ("1 of 2 pairs have no label yet" in capsys.readouterr().err) == bool(missing)
    labels = _read_jsonl(tmp_path / "run" / "round-000" / "labels.jsonl")
    assert [line["label"] for line in labels] == [session.left(0), session.left(1)]
    # How people labeled is no setting of the results.
    _run_config(project, tmp_path, loop=loop, oracle={"kind": "people", "via": "files"})
    assert main(argv) == 0


def test_run_is_refused_before_people_label_and_continues_when_corrected(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"learning_rate": 1e-3, "max_steps": 1}
    argv = ["run", str(_run_config(project, tmp_path))]
    for changes, expected in (
        (
            {
                "adapter": None,
                "lora": {"r": 2, "target_modules": ["q_proj", "lm_head"]},
                "strategy": "random",
            },
            "lora.target_modules: ",
        ),
        ({"dpo": {**good, "sync_ref_model": True}}, "sync_ref_model"),
        ({"dpo": {**good, "eval_strategy": "steps", "eval_steps": 1}}, "dpo.eval_strategy: "),
        ({"dpo": {**good, "pad_token": "<nope>"}}, "dpo.pad_token: "),
        ({"dpo": {**good, "precompute_ref_log_probs": True}}, "dpo.precompute_ref_log_probs: "),
        ({"dpo": {**good, "accelerator_config": "missing.json"}}, "dpo: "),
    ):
        _run_config(project, tmp_path, **changes)
        _refused(capsys, argv, expected)
        assert not (tmp_path / "run").exists()
    _run_config(project, tmp_path, dpo=good)
    assert main(argv) == 3
    _run_config(project, tmp_path, dpo={**good, "learning_rate": 1e-4})
    capsys.readouterr()
    assert main(argv) == 3
    assert "dpo.learning_rate (0.001, now 0.0001)" in capsys.readouterr().err


def test_run_with_a_reward_model_and_a_fresh_adapter(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    reward = LlamaForSequenceClassification(
        LlamaConfig(
            num_labels=1,
            vocab_size=384,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            pad_token_id=tiny_tokenizer().pad_token_id,
        )
    )
    reward.save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    changes = {
        "adapter": None,
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "oracle": {"kind": "reward_model", "model": str(tmp_path / "reward"), "temperature": 0.5},
        "strategy": "reward_gap",
        "reward": {"model": str(tmp_path / "reward"), "max_length": 64},
        "loop": {
            "rounds": 2,
            "batch_size": 2,
            "prompts_per_round": 5,
            "num_generations": 3,
            "max_completion_length": 4,
        },
        "rules": {"exclude": ["p1"], "group_by": "topic", "quotas": {"law": 0}},
    }
    argv = ["run", str(_run_config(project, tmp_path, **changes)), "--quiet"]
    capsys.readouterr()
    assert main(argv) == 0
    assert capsys.readouterr().out == ""
    labels = _read_jsonl(tmp_path / "run" / "round-001" / "labels.jsonl")
    assert {line["label"] for line in labels} <= {0, 1}
    for path in (tmp_path / "run").glob("round-*/*.jsonl"):
        assert "p1" not in [line["id"] for line in _read_jsonl(path)]
    picked = [
        line["id"]
        for path in (tmp_path / "run").glob("round-*/picked.jsonl")
        for line in _read_jsonl(path)
    ]
    assert picked and set(picked) <= {"p3", "p5", "p7"}
    rating = RewardModel(tmp_path / "reward", max_length=64)
    for folder in (tmp_path / "run").glob("round-*"):
        rows = {row["id"]: row for row in _read_jsonl(folder / "pool.jsonl")}
        for pick in _read_jsonl(folder / "picked.jsonl"):
            row = rows[pick["id"]]
            numbers = rating([row["prompt"]] * 3, row["responses"], [{}] * 3)
            a, b = (numbers[n] for n in pick["pair"])
            assert pick["score"] == pytest.approx(abs(a - b), abs=1e-6)

    # A causal language model has no reward head.
    changes["oracle"] = {"kind": "reward_model", "model": str(project / "model")}
    _run_config(project, tmp_path, **changes, output_dir=str(tmp_path / "other"))
    _refused(capsys, argv, "not a complete sequence classification model")
    assert not (tmp_path / "other").exists()


# -- the manners of the command line ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["selct"], "'select'"),
        (["select", "--output", "x"], "STORE"),
        (["select", "{store}"], "--output"),
        (["select", "{store}", "--output", "{tmp}/x", "--normalise", "pair"], "--normalise"),
        (
            ["select", "{store}", "--output", "{tmp}/x", "--normalize", "rows"],
            "--normalize rows: expected default, response, pair or none (see activedpo select",
        ),
        (["select", "{store}", "--output", "{tmp}/x", "--pairs", "0"], "--pairs"),
        (["select", "{store}", "--output", "{tmp}/x", "--pairs", "many"], "--pairs"),
        (["select", "{store}", "--output", "{tmp}/x", "--lam", "0"], "lam"),
        (["select", "{store}", "--output", "{tmp}/x", "--max-per-prompt", "0"], "--max-per-prompt"),
        (
            ["select", "{store}", "--output", "{tmp}/x", "--random-fraction", "2"],
            "--random-fraction",
        ),
        (
            ["select", "{store}", "--output", "{tmp}/x", "--min-score", "nan"],
            "min_score must be a fi",
        ),
        (
            [
                "select",
                "{store}",
                "--output",
                "{tmp}/x",
                "--min-score",
                "1",
                "--strategy",
                "random",
                "--pairs",
                "2",
            ],
            "min_score: the strategy 'random' has no scores",
        ),
        (["select", "{store}", "--output", "{tmp}/x", "--exclude", "{tmp}/no.txt"], "no such file"),
        (
            ["select", "{store}", "--output", "{tmp}/x", "--quota", "law"],
            "--quota law: expected NAME=",
        ),
        (["select", "{store}", "--output", "{tmp}/x", "--quota", "law=-1"], "expected NAME=N"),
        (["select", "{store}", "--output", "{tmp}/x", "--quota", "=1"], "expected NAME=N"),
        (
            ["select", "{store}", "--output", "{tmp}/x", "--quota", "a=1", "--quota", "a=2"],
            "--quota a=2: 'a' has a quota already",
        ),
        (["select", "{store}", "--output", "{tmp}/x", "--quota", "law=1"], "group_by missing"),
        (["select", "{store}", "--output", "{tmp}/x", "--group-by", "topic"], "quotas missing"),
        (
            [
                "select",
                "{store}",
                "--output",
                "{tmp}/x",
                "--group-by",
                "topic",
                "--quota",
                "art=1",
                "--pairs",
                "2",
            ],
            "quotas: no item's 'topic' is 'art'",
        ),
        (
            ["select", "{store}", "--output", "{tmp}/x", "--cost", "topic", "--pairs", "2"],
            "cost: 'topic' of item 'p0' must be a positive number, not 'law'",
        ),
        (["select", "{store}", "--output", "{tmp}"], "is a folder"),
        (["select", "{store}", "--output", "{store}/manifest.json/x"], "not a writable folder"),
        (["select", "{tmp}", "--output", "{tmp}/x"], "not a feature store (no manifest.json in"),
        (
            ["select", "{tmp}/no", "--output", "{tmp}/x"],
            "/no is not a feature store (there is no such folder): give the folder that `activedpo",
        ),
        (
            ["select", "{store}", "--labeled", "{tmp}/no.jsonl", "--output", "{tmp}/x"],
            "no such file",
        ),
        (["features", "{tmp}/none.jsonl", "{m}", "{a}", "{o}"], "none.jsonl"),
        (["features", "{pool}.txt", "{m}", "{a}", "{o}"], "suffix"),
        (["features", "{pool}", "--model={tmp}/none", "{a}", "{o}"], "no such model folder"),
        (["features", "{pool}", "--model={tmp}", "{a}", "{o}"], "not a model folder"),
        (["features", "{pool}", "{m}", "{o}"], "pass --adapter DIR"),
        (["features", "{pool}", "{m}", "--adapter={tmp}", "{o}"], "adapter_config.json"),
        (["features", "{pool}", "{m}", "--adapter={m:raw}", "{o}"], "adapter_config.json"),
        (["features", "{pool}", "{m}", "{a}", "{o}", "--proj-dim", "0"], "--proj-dim: 0"),
        (["features", "{pool}", "{m}", "{a}", "{o}", "--beta", "-1"], "beta"),
        (["features", "{pool}", "{m}", "{a}", "{o}", "--max-length", "1"], "--max-length: 1"),
        (["features", "{pool}", "{m}", "{a}", "{o}", "--dtype", "int8"], "int8"),
        (["features", "{pool}", "{m}", "{a}", "{o}", "--device", "toaster"], "toaster"),
        (
            ["features", "{pool}", "{m}", "{a}", "{o}", "--max-tokens-per-batch", "0"],
            "--max-tokens",
        ),
        (["features", "{pool}", "{m}", "{a}", "{o}", "--export", "{tmp}"], "is a folder"),
        (["run", "{tmp}/none.yaml"], "none.yaml"),
        (["env", "--verbose"], "--verbose"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    project: Path,
    store: Path,
    tmp_path: Path,
    argv: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "{store}": str(store),
        "{tmp}": str(tmp_path),
        "{pool}": str(project / "pool.jsonl"),
        "{m:raw}": str(project / "model"),
        "{m}": f"--model={project / 'model'}",
        "{a}": f"--adapter={project / 'adapter'}",
        "{o}": f"--output={tmp_path / 'store'}",
    }
    filled = []
    for argument in argv:
        for place, value in places.items():
            argument = argument.replace(place, value)
        filled.append(argument)
    _refused(capsys, filled, expected)
    assert list(tmp_path.iterdir()) == []


def test_broken_pool_line_is_named(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = _write_jsonl(tmp_path / "pool.jsonl", _rows(4))
    pool.write_text(pool.read_text() + '{"id": "x", "prompt": \n')
    _refused(capsys, _features(project, tmp_path / "store", pool=pool), "line 5", "broken JSON")
    assert not (tmp_path / "store").exists()


def test_adapters_that_do_not_fit_are_refused_before_anything_is_written(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "gpt2": (lora(tiny_causal_lm("gpt2"), "gpt2"), "does not fit"),
        "deeper": (lora(tiny_causal_lm("llama", num_hidden_layers=3), "llama"), "does not fit"),
        "shallower": (lora(tiny_causal_lm("llama", num_hidden_layers=1), "llama"), "does not fit"),
        "wider": (lora(tiny_causal_lm("llama", hidden_size=64), "llama"), "does not fit"),
    }
    for name, (model, expected) in wrong.items():
        model.save_pretrained(tmp_path / name)
        argv = _features(project, tmp_path / "store", adapter=tmp_path / name)
        for options in ([], ["--no-verify"]):
            _refused(capsys, [*argv, *options], expected)
            assert not (tmp_path / "store").exists()


def test_an_incomplete_model_is_refused(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    argv = _features(project, tmp_path / "store", model=tmp_path / "model")
    _refused(capsys, argv, "not a complete", "model.layers.1.mlp.up_proj.weight")


def test_half_precision_is_loaded_as_float32_on_the_cpu_and_logged(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_causal_lm("llama", torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    capsys.readouterr()
    argv = [*_features(project, tmp_path / "store", model=tmp_path / "model"), "--device", "cpu"]
    assert main(argv) == 0
    assert "loading it as float32" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["settings"]["dtype"] == "float32"


def test_quiet_prints_nothing(
    project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main([*_features(project, tmp_path / "store"), "--quiet"]) == 0
    assert (
        main(
            [
                "select",
                str(tmp_path / "store"),
                "--pairs",
                "2",
                "-q",
                "--output",
                str(tmp_path / "x.jsonl"),
            ]
        )
        == 0
    )
    assert capfd.readouterr() == ("", "")


def test_unexpected_errors_keep_their_traceback(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(select_command, "run_selection", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["select", str(store), "--pairs", "2", "--output", str(tmp_path / "x.jsonl")])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"activedpo-fast {activedpo_fast.__version__}\n"


def test_env_names_what_is_active(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "reference")
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["sjlt", "on", "cpu:", "reference", "active"] in lines
    monkeypatch.setenv("ACTIVEDPO_BACKEND", "abacus")
    _refused(capsys, ["env"], "ACTIVEDPO_BACKEND", "abacus")


@pytest.mark.parametrize(
    "command", ["env", "features", "select", "exchange export", "exchange import", "run", "demo"]
)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"  activedpo {command}" in capsys.readouterr().out


def _process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )


def test_help_as_a_process() -> None:
    light = _process(
        "import runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n"
        "    runpy.run_module('activedpo_fast', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    sys.exit(end.code or 'torch' in sys.modules)\n"
    )
    assert light.returncode == 0 and "features" in light.stdout


def test_commands_as_a_process(project: Path, store: Path, tmp_path: Path) -> None:
    """In one process, which imports for seconds."""
    picked = tmp_path / "picked.jsonl"
    select = ["select", str(store), "--output", str(picked), "--pairs", "3"]
    config = _run_config(project, tmp_path, dpo={"max_steps": 1, "lr_scheduler_type": "zigzag"})
    done = _process(
        "import sys\n"
        "from activedpo_fast.cli.app import main\n"
        f"assert main({select}) == 0\n"
        "assert 'peft' not in sys.modules\n"  # which takes seconds
        "print('run:', flush=True)\n"
        f"sys.exit(main({['run', str(config)]}))\n"
    )
    assert len(_read_jsonl(picked)) == 3
    assert done.returncode == 2 and done.stdout.endswith("run:\n")
    # Warnings of other libraries would be extra lines here.
    assert done.stderr.startswith("activedpo: error: ")
    assert done.stderr.count("\n") == 1 and "dpo: zigzag is not a valid" in done.stderr


def test_select_does_not_overwrite_labels_or_the_store(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, picked = project / "store", tmp_path / "picked.jsonl"
    argv = ["select", str(store), "--pairs", "2", "--output"]
    assert main([*argv, str(picked)]) == 0 and main([*argv, str(picked)]) == 0  # no label is lost
    rows = [{**row, "label": n} for n, row in enumerate(_read_jsonl(picked))]
    picked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = picked.read_bytes(), (store / "pool.jsonl").read_bytes()
    capsys.readouterr()
    for more, said in (
        ([str(picked)], "has 2 labels"),
        ([str(picked), "--labeled", str(picked)], "is what --labeled names"),
        ([str(store / "pool.jsonl")], "is inside a feature store"),
    ):
        assert main([*argv, *more]) == 2
        assert said in capsys.readouterr().err
    edited = tmp_path / "edited.jsonl"
    edited.write_text(picked.read_text().replace('"label": 1}', '"label": 1'))
    assert main([*argv, str(edited)]) == 2
    assert "exists and cannot be read" in capsys.readouterr().err
    assert before == (picked.read_bytes(), (store / "pool.jsonl").read_bytes())
