"""Selections by 2 to 4 gloo processes: the picks of one process, or an error everywhere."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from itertools import count

import pytest
import torch
import torch.distributed as dist

from activedpo_fast.distributed.processes import Processes
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.selection.eligible import Eligible, random_order
from activedpo_fast.selection.greedy.logdet import greedy_logdet
from activedpo_fast.selection.greedy.top import rank_top
from tests.support.processes import run_processes
from tests.support.quick import slow_except

PROMPTS, RESPONSES, PAIRS, DIM = 60, 3, 3, 48


def problem():
    """Rows with copies in the parts of other processes, so that ties cross processes; all pairs."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(PROMPTS * RESPONSES, DIM, generator=generator)
    for source, target in ((45, 2), (31, 30), (59, 16)):
        rows[target * RESPONSES : (target + 1) * RESPONSES] = rows[
            source * RESPONSES : (source + 1) * RESPONSES
        ]
    rows[RESPONSES * 20 : RESPONSES * 21] = 1.0  # pairs with a zero feature
    within = torch.combinations(torch.arange(RESPONSES))
    pairs = torch.cat([within + RESPONSES * p for p in range(PROMPTS)])
    return rows, pairs


def share(rank, world):
    """First and last prompt of a process; the shares are uneven, and from 3 on one is empty."""
    ends = {1: [], 2: [41], 3: [41, 41], 4: [7, 40, 40]}
    bounds = [0, *ends[world], PROMPTS]
    return bounds[rank], bounds[rank + 1]


def rules(name, first, last):
    """The rules of a case for the prompts of one process, made from those of all."""
    prompt = torch.arange(PROMPTS * PAIRS) // PAIRS
    mine = slice(first * PAIRS, last * PAIRS)
    options = {}
    if name == "rules":
        options = dict(
            prompt=prompt[mine], max_per_prompt=1, quota_group=(prompt[mine] % 3) - 1, room=[3, 4]
        )
    if name == "cost":
        options = dict(inverse_cost=1 / (1 + prompt[mine].double() % 5), min_score=1.9)
    if name == "random":
        options = dict(n_random=7, random_order=random_order(PROMPTS * PAIRS, 5)[mine])
    return Eligible(torch.ones(len(prompt[mine]), dtype=torch.bool), **options)


def cases(rank, world, group):
    """{name: (indices, scores)} of one process's view of every case."""
    rows, pairs = problem()
    first, last = share(rank, world)
    mine = rows[first * RESPONSES : last * RESPONSES]
    my_pairs = pairs[first * PAIRS : last * PAIRS] - first * RESPONSES
    history = (rows[:40] + 0.5, torch.arange(40).view(-1, 2))
    found = {}
    for how in ("response", "pair", None):
        got = greedy_logdet(mine, my_pairs, 50, normalize=how, lam=0.1, group=group)
        found[f"normalize {how}"] = got
    found["all"] = greedy_logdet(mine.double(), my_pairs, len(pairs), lam=1e-3, group=group)
    found["history"] = greedy_logdet(mine, my_pairs, 30, history=history, group=group)
    for name in ("rules", "cost", "random"):
        found[name] = greedy_logdet(
            mine, my_pairs, 40, eligible=rules(name, first, last), group=group
        )
        scores = mine[my_pairs[:, 0], 0].double().abs()
        found[f"top, {name}"] = rank_top(
            scores, scores * 1e-15, 40, rules(name, first, last), group
        )
    return {
        name: (ranking.indices.tolist(), ranking.scores.tolist()) for name, ranking in found.items()
    }


def failures(rank, world, group):
    """The error in each process when another process fails: {name: message}."""
    rows, pairs = problem()
    first, last = share(rank, world)
    mine = rows[first * RESPONSES : last * RESPONSES].clone()
    my_pairs = pairs[first * PAIRS : last * PAIRS] - first * RESPONSES
    told = {}

    def attempt(name, n=10, **settings):
        try:
            told[name] = greedy_logdet(mine, my_pairs, n, group=group, **settings)
        except ActiveDPOError as error:
            told[name] = str(error)

    attempt("too many", n=1000)
    attempt("settings", lam=1.0 if rank else 2.0)
    attempt("history", history=(rows[:4] + rank, torch.arange(4).view(2, 2)))
    everything = torch.ones(len(my_pairs), dtype=torch.bool)
    attempt("rules", eligible=Eligible(everything, min_score=0.5 if rank else -float("inf")))
    if rank == world - 1:
        mine[0, 0] = float("nan")
    attempt("rows")
    return told


def lose_one(rank, world, group):
    """The last process exits in the middle of its picks."""
    rows, pairs = problem()
    first, last = share(rank, world)
    if rank == world - 1:
        original, picks = Processes.share, count()

        def leave(self, *arguments):
            if next(picks) == 4:
                os._exit(0)
            return original(self, *arguments)

        Processes.share = leave
    try:
        greedy_logdet(
            rows[first * RESPONSES : last * RESPONSES],
            pairs[first * PAIRS : last * PAIRS] - first * RESPONSES,
            10,
            group=group,
        )
    except ActiveDPOError as error:
        return str(error)
    return "picked"


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=10),
    )
    group = dist.group.WORLD
    result = {"cases": cases(rank, world, group), "failures": failures(rank, world, group)}
    result["lost"] = lose_one(rank, world, group)  # the last thing that the last process does
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(result, file)
    os._exit(0)  # the group cannot be shut down cleanly: one process is gone


@pytest.fixture(scope="module", params=slow_except([3], [2, 3, 4]))
def results(request, tmp_path_factory):
    """The results of each process except the lost one."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    run_processes(work, (request.param, str(folder)), request.param)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param - 1)]


def test_all_processes_make_the_picks_of_a_single_one(results):
    alone = cases(0, 1, None)
    for result in results:
        assert result["cases"].keys() == alone.keys()
        for name, (indices, scores) in alone.items():
            got, got_scores = result["cases"][name]
            assert got == indices, name
            assert got_scores == pytest.approx(scores, rel=1e-10, abs=1e-20), name
    assert len(alone["rules"][0]) < 40 and len(alone["cost"][0]) < 40  # the rules have an effect


def test_an_error_in_one_process_is_an_error_in_all(results):
    last = len(results)
    for result in results:
        told = result["failures"]
        assert "1000 pairs are asked for, but there are only 180" in told["too many"]
        assert "processes 0 and 1 have lam = 2 and 1: they must agree" in told["settings"]
        assert "log det V" in told["history"]
        assert "processes 0 and 1 have min_score = -inf and 0.5" in told["rules"]
        assert told["rows"] == (
            f"process {last} of {last + 1} failed, see its own error; nothing was selected"
        )


def test_a_lost_process_ends_the_selection_of_the_others(results):
    for result in results:
        assert "lost contact with another" in result["lost"]
        assert "nothing was selected" in result["lost"]
