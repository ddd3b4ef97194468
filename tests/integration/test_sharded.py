"""Whole selections by 2 processes, from a model and from a store, are those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from activedpo_fast.cli.app import main
from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import tokenize_pool
from activedpo_fast.selection.result import Selection
from activedpo_fast.selection.rules import PickRules
from activedpo_fast.selection.strategies import STRATEGIES
from activedpo_fast.selector import ActiveDPOSelector
from activedpo_fast.store.store import FeatureStore
from tests.support.killing import run_together
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.processes import run_processes

WORLD = 2
WORDS = ["sketch", "label", "fox", "dog", "model", "prompt", "choose", "less", "quick"]
RULES = PickRules(
    max_per_prompt=1,
    exclude=["item-1", "item-9"],
    group_by="topic",
    quotas={"law": 2, "art": 3},
    random_fraction=0.3,
)
COSTS = PickRules(cost="price", min_score=0.2, max_per_prompt=2)


def make_pool(count: int = 12, start: int = 0) -> PreferencePool:
    """Items of two to four responses; the third does not fit a max_length of 60."""
    return PreferencePool.from_rows(
        {
            "id": f"item-{i}",
            "prompt": f"Number {i * 37 % 101} about {WORDS[i % 9]}."
            + " far too long" * 9 * (i == 2),
            "responses": [
                f" {WORDS[(i + 2 * j) % 9]} {WORDS[(i * j + 5) % 9]} {i * j}"
                for j in range(2 + i % 3)
            ],
            "topic": ("law", "art", "math")[i % 3],
            "price": 1.0 + i % 4,
            "rewards": [(i * 7 + j * 5) % 11 for j in range(2 + i % 3)],
        }
        for i in range(start, start + count)
    )


def make_model():
    """With few trained numbers, of which the unsketched rows are."""
    targets = ["q_proj", "v_proj", "down_proj"]
    return lora(tiny_causal_lm("llama", torch.float64), "llama", r=2, target_modules=targets)


def chooser(model, strategy: str = "activedpo", **options) -> ActiveDPOSelector:
    return ActiveDPOSelector(
        model,
        tiny_tokenizer(),
        strategy=strategy,
        sketch="none",
        beta=0.3,
        max_length=60,
        seed=4,
        max_tokens_per_batch=4000,
        **options,
    )


def make_spread_pool() -> PreferencePool:
    """Items of four prompts in turn, so that each process has some of every prompt. Items 9 and 2
    have the prompt and two of the responses of items 1 and 6, in another order."""
    texts = [[f" {WORDS[(i + 2 * j) % 9]} {i * j}" for j in range(2 + i % 3)] for i in range(12)]
    texts[9][:2], texts[6][:2] = texts[1][1::-1], texts[2][1::-1]
    return PreferencePool.from_rows(
        {
            "id": f"row-{i}",
            "prompt": f"Number {i % 4} about {WORDS[i % 4]}.",
            "responses": texts[i],
            "post": i % 3,
            "rewards": [(i * 7 + j * 5) % 11 for j in range(2 + i % 3)],
        }
        for i in range(12)
    )


# Every run of the suite makes these selections: each strategy with rules and a history, or by post,
# and each other way of selecting once. `make test-slow` makes all.
QUICK = {
    "activedpo",
    "activedpo, history",
    *(f"{strategy}, rules" for strategy in STRATEGIES),
    *("adpo_plus, response, two stages, history", "activedpo, pair, two stages, rules"),
    *("one of one, two stages", "all", "costs", "shortlist"),
    *("activedpo, spread", "aplp, spread", "apo, by post", "activedpo, one each"),
}


def cases(group: dist.ProcessGroup | None, every: bool) -> dict[str, list]:
    """The selections, with one line per pick."""
    model, pool = make_model(), make_pool()
    earlier = chooser(model).select(make_pool(5, start=20), 3)
    history = [chooser(model).select(pool, 4), earlier]
    one = Selection(earlier.picks[:1], "activedpo")  # less than one for each process
    found = {}

    def select(name: str, own: ActiveDPOSelector, pool=pool, n=8, **given) -> None:
        if every or name in QUICK:
            found[name] = own.select(pool, n, group=group, **given)

    for strategy in STRATEGIES:
        options = {"normalize": "pair"} if strategy == "adpo_plus" else {}
        own = chooser(model, strategy, **options)
        select(strategy, own)
        select(f"{strategy}, history", own, labeled=history)
        select(f"{strategy}, rules", own, labeled=one, rules=RULES)
    for strategy in ("activedpo", "adpo_plus"):
        for normalize in ("response", "pair"):
            own = chooser(model, strategy, normalize=normalize, preselect=2)
            name = f"{strategy}, {normalize}, two stages"
            select(name, own)
            select(f"{name}, history", own, n=3, labeled=history)
            select(f"{name}, rules", own, labeled=one, rules=RULES)
    one_pair = chooser(model, preselect=1)  # of which a process has none
    select("one of one, two stages", one_pair, n=1)
    select("one of one, two stages, history", one_pair, n=1, labeled=history[1])
    select("all", chooser(model), n=34)
    select("costs", chooser(model, lam=0.1), rules=COSTS, labeled=history)
    shortlist = {"strategy_options": {"shortlist": 1.0}}
    select("shortlist", chooser(model, "aplp", **shortlist), n=3)
    spread = make_spread_pool()
    # Pairs of the pool, labeled under ids that it does not have.
    renamed = Selection(
        tuple(replace(pick, id=f"old-{pick.id}") for pick in chooser(model).select(spread, 3)),
        "activedpo",
    )
    by_post = PickRules(max_per_prompt=1, prompt_by="post", exclude=["row-2"])
    for strategy in STRATEGIES:
        own = chooser(model, strategy, **(shortlist if strategy == "aplp" else {}))
        two = PickRules(max_per_prompt=2)
        select(f"{strategy}, spread", own, spread, rules=two, labeled=renamed)
        select(f"{strategy}, by post", own, spread, rules=by_post)
    each = PickRules(max_per_prompt=1, random_fraction=0.3)
    for strategy in ("activedpo", "margin_large"):
        own = chooser(model, strategy)
        select(f"{strategy}, one each", own, spread, rules=each, asked=renamed)
    select("all of the spread", chooser(model), spread, n=99)
    assert found.keys() >= QUICK
    return {
        name: [[p.id, *p.pair, p.rank, p.score] for p in picks] for name, picks in found.items()
    }


def failures(rank: int, group: dist.ProcessGroup) -> dict[str, str]:
    """The error in each process when the second has wrong input: {name: message}."""
    model, pool = make_model(), make_pool()
    told = {}

    def attempt(name, pool=pool, n=3, strategy="activedpo", options=None, **given):
        try:
            chooser(model, strategy, **(options or {})).select(pool, n, group=group, **given)
        except ActiveDPOError as error:
            told[name] = str(error)

    attempt("negative", n=-1)
    attempt("too small", pool=pool[:1])
    attempt("pool", pool=pool[rank:])
    attempt("n", n=3 + rank)
    attempt("strategy", strategy=("apo", "random")[rank])
    attempt("lam", options={"lam": 1.0 + rank})
    attempt("preselect", options={"preselect": 1 + rank})
    attempt("layers", options={"preselect": 1, "last_layers": 1 + rank})
    attempt("length", options={"truncation_mode": ("keep_start", "keep_end")[rank]})
    attempt("rules", rules=PickRules(max_per_prompt=1 + rank))
    rows = [
        {"id": item.id, "prompt": item.prompt, "responses": item.responses, "price": 1.0 + rank}
        for item in pool
    ]
    attempt("price", pool=PreferencePool.from_rows(rows), rules=PickRules(cost="price"))
    attempt("labeled", labeled=None if rank else chooser(model).select(pool, 1))
    attempt("asked", asked=None if rank else chooser(model).select(pool, 1))
    posts = [
        PreferencePool.from_rows(
            {"id": item.id, "prompt": item.prompt, "post": n % (2 + r), "responses": item.responses}
            for n, item in enumerate(pool)
        )
        for r in range(WORLD)
    ]
    attempt("posts", pool=posts[rank], rules=PickRules(max_per_prompt=1, prompt_by="post"))
    head = model.get_output_embeddings().weight
    if rank == 1:
        with torch.no_grad():
            head[:] = float("nan")  # a weight that is not trained
    attempt("scores", strategy="margin_large")
    attempt("rows")
    if rank == 1:
        next(p for p in model.parameters() if p.requires_grad).data += 1
    attempt("weights")
    return told


def commands(rank: int, store: str, ports: list[int], folder: Path) -> dict[str, list]:
    """Exit code and stderr of `activedpo select` for bad input, as started by a launcher."""
    (folder / "labels-0.jsonl").write_text('{"id": "item-0", "pair": [0, 1], "label": 0}\n')
    (folder / "labels-1.jsonl").write_text('{"id": "item-0", "pair": [0]}\n')
    said = {}
    for name, port, options in (
        ("rules", ports[0], ["--group-by", "none", "--quota", "art=1"]),
        ("labels", ports[1], ["--labeled", str(folder / f"labels-{rank}.jsonl"), "--pairs", "3"]),
    ):
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        with redirect_stderr(StringIO()) as stderr:
            code = main(["select", store, *options, "--output", str(folder / "picked.jsonl")])
        said[name] = [code, stderr.getvalue(), (folder / "picked.jsonl").exists()]
    return said


def work(rank: int, store: str, ports: list[int], folder: Path, every: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(minutes=10),
    )
    world = dist.group.WORLD
    result = {"cases": cases(world, every), "failures": failures(rank, world)}
    dist.destroy_process_group()
    result["commands"] = commands(rank, store, ports, folder)
    (folder / f"{rank}.json").write_text(json.dumps(result))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    pool, model, tokenizer = make_pool(), make_model(), tiny_tokenizer()
    tokens = tokenize_pool(pool, tokenizer, max_length=60)
    store = FeatureStore.create(
        path, pool, {"model": "tiny"}, skipped=tokens.skipped, dtype="float64"
    )
    store.fill(
        FeatureExtractor(model, Sketch("sjlt", 64), max_tokens_per_batch=4000),
        tokens,
        rows_per_shard=8,
    )
    return path


@pytest.fixture(
    scope="module", params=["quick", pytest.param("every selection", marks=pytest.mark.slow)]
)
def every(request: pytest.FixtureRequest) -> bool:
    return request.param != "quick"


@pytest.fixture(scope="module")
def results(tmp_path_factory, store: Path, every: bool) -> list[dict]:
    """The results of each process."""
    folder = tmp_path_factory.mktemp("sharded")
    run_processes(work, (str(store), free_ports(2), folder, every), WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_all_return_the_selection_of_one_process(results, every: bool) -> None:
    alone = cases(None, every)
    assert len({len(picks) for picks in alone.values()}) > 2  # some rules leave fewer
    assert alone["activedpo"] != alone["activedpo, history"] != alone["activedpo, rules"]
    for result in results:
        assert result["cases"].keys() == alone.keys()
        for name, expected in alone.items():
            got = result["cases"][name]
            assert [pick[:-1] for pick in got] == [pick[:-1] for pick in expected], name
            # Hidden states are kept in float32.
            rel = 1e-4 if name.startswith("apo") else 1e-8
            assert [pick[-1] for pick in got] == pytest.approx(
                [pick[-1] for pick in expected], rel=rel
            ), name
    assert results[0]["cases"] == results[1]["cases"]
    pool = make_spread_pool()
    for name, picks in alone.items():
        ids = [pick[0] for pick in picks]
        if name.endswith(", spread"):
            prompts = [pool[pool.position(id)].prompt for id in ids]
            assert {prompts.count(prompt) for prompt in prompts} == {2} and len(prompts) == 8, name
        elif name.endswith("one each"):
            assert len({pool[pool.position(id)].prompt for id in ids}) == len(ids) == 4, name
        elif name.endswith("by post"):
            assert sorted(pool[pool.position(id)].extra["post"] for id in ids) == [0, 1], name


def test_wrong_input_in_one_process_is_an_error_in_all(results) -> None:
    for rank, result in enumerate(results):
        told = result["failures"]
        assert "n must be 0 or more, not -1" in told["negative"]
        assert told["too small"] == (
            "2 processes cannot share a pool of 1 prompts: each needs one or more"
        )
        for name, given in (
            ("pool", "pool"),
            ("n", "n"),
            ("strategy", "strategy"),
            ("lam", "strategy"),
            ("preselect", "preselect"),
            ("layers", "last_layers"),
            ("length", "tokenization"),
            ("rules", "rules"),
            ("price", "pool"),
            ("labeled", "labeled"),
            ("asked", "asked"),
            ("posts", "pool"),
        ):
            assert told[name] == (
                f"process 1 has another {given} than process 0: all must be given the same"
            ), name
        assert "norm of the trainable weights" in told["weights"]
        # Only the process whose numbers are bad can name them.
        for name, own in (("scores", "is not finite"), ("rows", "is not finite")):
            assert (own if rank else "process 1 of 2 failed, see its own error") in told[name]


def test_parts_are_whole_items_of_about_as_many_responses() -> None:
    pool = make_pool(40)
    for size in (1, 2, 3, 7, 40):
        parts = []
        for rank in range(size):
            shares = PoolProcesses(None)
            shares.rank, shares.size = rank, size
            parts.append(shares.part(pool))
        offsets = pool.response_offsets.tolist()
        assert [p for part in parts for p in part.items] == list(range(40))
        for part in parts:
            assert len(part.items) > 0
            assert (part.rows.start, part.rows.stop) == (
                offsets[part.items.start],
                offsets[part.items.stop],
            )
            if size < 40:
                assert abs(len(part.rows) - offsets[-1] / size) <= 4


# -- the command line ------------------------------------------------------------------------------


def forked(argv: list[str]) -> str:
    results = run_together([argv] * WORLD)
    assert [code for code, _, _ in results] == [0] * WORLD, results
    lines = [line for _, _, said in results for line in said.splitlines(True)]
    return "".join(line for line in lines if not line.startswith("activedpo: "))  # warnings


def under_torchrun(argv: list[str]) -> str:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "activedpo_fast", *argv],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("launched", [forked, pytest.param(under_torchrun, marks=pytest.mark.slow)])
def test_select_by_a_launcher_writes_the_file_of_one_process(
    launched: Callable[[list[str]], str],
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "labels.jsonl").write_text(
        '{"id": "item-0", "pair": [0, 1], "label": 1}\n'
        '{"id": "item-11", "pair": [0, 3], "label": 0}\n'
    )
    argv = [
        "select",
        str(store),
        "--labeled",
        str(tmp_path / "labels.jsonl"),
        "--pairs",
        "10",
        "--max-per-prompt",
        "1",
        "--group-by",
        "topic",
        "--quota",
        "law=2",
        "--random-fraction",
        "0.2",
        "--output",
    ]
    capsys.readouterr()
    assert main([*argv, str(tmp_path / "one.jsonl")]) == 0
    alone = capsys.readouterr().out
    together = launched([*argv, str(tmp_path / "two.jsonl")])
    assert together.split(" picked by ")[0] == alone.split(" picked by ")[0]
    assert together.count("\n") == 1
    one, two = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("one.jsonl", "two.jsonl")
    )
    assert len(one) == 9  # the rules leave no more
    assert [line.pop("score") for line in two] == pytest.approx(
        [line.pop("score") for line in one], rel=1e-10
    )
    assert one == two


def test_bad_input_to_a_shared_select_is_one_line_and_no_file(results) -> None:
    for name, speaker, expected in (
        ("rules", 0, "activedpo: error: group_by: there is no column 'none'"),  # all find it
        ("labels", 1, "two different"),
    ):
        for rank, result in enumerate(results):
            code, error, there = result["commands"][name]
            assert (code, there, error.count("\n")) == (2, False, int(rank == speaker))
            assert error == "" or expected in error


def test_missing_variables_of_a_launcher_are_an_error(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    assert main(["select", str(store), "--output", str(tmp_path / "x.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("activedpo: error: WORLD_SIZE is 2, but") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    for size in ("", "0"):  # as some launchers and container files leave it
        monkeypatch.setenv("WORLD_SIZE", size)
        assert (
            main(["select", str(store), "--pairs", "2", "--output", str(tmp_path / "x.jsonl")]) == 0
        )
