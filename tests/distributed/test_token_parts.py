"""A pool tokenized in parts by gloo processes: the tokens of one, or its error everywhere."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from activedpo_fast.distributed.pool_parts import PoolProcesses
from activedpo_fast.distributed.token_parts import tokenize_in_parts
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import TokenizedPool, tokenize_pool
from tests.support.models import tiny_tokenizer
from tests.support.processes import run_processes

HOW: Any = {"max_length": 16, "truncation_mode": "keep_start", "chat_template_kwargs": None}


def pool(prompts: int) -> PreferencePool:
    """Items of two to four responses; the prompt of every fifth one is too long."""
    return PreferencePool.from_rows(
        {
            "id": f"p{n}",
            "prompt": "fox " * (20 if n % 5 == 4 else 1) + f"{n}?",
            "responses": [f" dog {m}" * (m + 1) for m in range(2 + n % 3)],
        }
        for n in range(prompts)
    )


class Listener(logging.Handler):
    """What is logged, in a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def as_json(tokens: TokenizedPool) -> Any:
    sequences = [[list(s.input_ids), s.completion_start] for s in tokens.sequences]
    return [sequences, tokens.skipped, tokens.items, tokens.ids]


def worker(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    processes = PoolProcesses(dist.group.WORLD)
    tokenizer = tiny_tokenizer()
    lines: list[str] = []
    logging.getLogger("activedpo_fast").addHandler(Listener(lines))
    found = [as_json(tokenize_in_parts(pool(n), tokenizer, processes, **HOW)) for n in (17, 5, 1)]
    if rank == 1:
        tokenizer.eos_token = None
    try:
        tokenize_in_parts(pool(17), tokenizer, processes, **HOW)
    except ActiveDPOError as error:
        found.append(str(error))
    with open(f"{folder}/{world}-{rank}.json", "w") as file:
        json.dump([*found, lines], file)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_tokens_are_those_of_one_process(world, tmp_path, caplog):
    run_processes(worker, (world, str(tmp_path)), world)
    expected = [as_json(tokenize_pool(pool(n), tiny_tokenizer(), **HOW)) for n in (17, 5, 1)]
    assert expected[0][1] == [4, 9, 14] and "3 of 17 prompts fill" in caplog.text
    for rank in range(world):
        *found, error, lines = json.loads((tmp_path / f"{world}-{rank}.json").read_text())
        assert found == expected and lines == (caplog.messages if rank == 0 else [])
        assert "EOS" in error if rank == 1 else "process" in error
