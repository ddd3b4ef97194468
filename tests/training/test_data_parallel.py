"""A script's own loop in two processes: training, generation and rounds as in one."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.items import Prompt
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer

PROMPTS = [Prompt(f"p{n}", "The fox" + " dog" * n) for n in range(5)]
ROWS = [
    {"prompt": f"label {n}?", "chosen": f" fox {n}", "rejected": " dog" * (n % 3 + 1)}
    for n in range(8)
]


def train(folder: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Train two epochs; return the adapter, and what the training returns."""
    import datasets

    from activedpo_fast.models.adapters import adapter_state
    from activedpo_fast.training.trl import dpo_config, train_dpo

    model = lora(tiny_causal_lm("llama"), "llama")
    args = dpo_config(
        output_dir=str(folder), learning_rate=1e-2, num_train_epochs=2, logging_steps=3, **options
    )
    trained = train_dpo(
        model,
        tiny_tokenizer(),
        datasets.Dataset.from_list(ROWS),
        args,
        initial_adapter=adapter_state(model),
        show_progress=False,
    )
    del trained["seconds"]
    return adapter_state(model), trained


def generate(group: Any = None) -> list[Any]:
    """Sample responses in batches of 2, some of them again."""
    from activedpo_fast.training.generation import generate_responses

    pool = generate_responses(
        lora(tiny_causal_lm("llama"), "llama"),
        tiny_tokenizer(),
        PROMPTS,
        num_generations=3,
        max_completion_length=1,
        temperature=0.7,
        seed=3,
        generation_batch_size=2,
        max_attempts=6,
        group=group,
    )
    return [(item.id, item.responses) for item in pool]


def rounds(folder: Path) -> tuple[list[Any], list[str]]:
    """Run rounds of one prompt each; return the records, and which functions were called."""
    from activedpo_fast.labels import CallableOracle
    from activedpo_fast.training.loop import ActiveDPOLoop
    from activedpo_fast.training.trl import dpo_config

    calls = []

    def respond(*, prompts: Any, num_generations: int, **_: Any) -> list[list[str]]:
        calls.append("generate")
        return [[f" fox {n}" for n in range(num_generations)] for _ in prompts]

    def prefer(prompt: Any, a: Any, b: Any) -> int:
        calls.append("label")
        return 0

    def evaluate(model: Any) -> dict[str, float]:
        calls.append("evaluate")
        return {"metric": len(calls)}

    loop = ActiveDPOLoop(
        lora(tiny_causal_lm("llama"), "llama"),
        tiny_tokenizer(),
        PROMPTS,
        CallableOracle(prefer),
        output_dir=folder,
        dpo_args=dpo_config(output_dir=str(folder / "trainer"), max_steps=1),
        rounds=1,
        batch_size=1,
        prompts_per_round=1,
        generate=respond,
        evaluate=evaluate,
        selector_options={"proj_dim": 16, "verify": False},
        show_progress=False,
    )
    found = [(r.labels_total, r.metrics, r.training) for r in loop.run()]
    return found, calls


def work(rank: int, world: int, port: int, folder: str) -> None:
    """What a script does that torchrun starts."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("activedpo_fast.training.data_parallel").addHandler(handler)
    out = Path(folder)
    weights, trained = train(out, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert not warnings
    weights, trained = train(out, per_device_train_batch_size=4)
    assert not warnings
    train(out, per_device_train_batch_size=3, max_steps=1)
    save_file(weights, out / f"{rank}.safetensors")
    told = {
        "trained": trained,
        "warnings": warnings,
        "generated": generate(torch.distributed.group.WORLD),
        "rounds": rounds(out / "run"),
    }
    (out / f"{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Any]]]:
    assert pytest.importorskip("trl").DPOTrainer  # imported once
    folder = tmp_path_factory.mktemp("shared")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Forks have TRL imported, which takes each other process long.
    mp.start_processes(work, (2, port, str(folder)), 2, start_method="fork")
    yield folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_training_step_of_two_processes_is_that_of_one(
    shared: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    folder, told = shared
    weights, trained = train(tmp_path, per_device_train_batch_size=4)
    for rank in range(2):
        got = load_file(folder / f"{rank}.safetensors")
        torch.testing.assert_close(got, weights, rtol=0, atol=1e-6)
        assert told[rank]["trained"] == pytest.approx(trained, abs=1e-6)
    assert told[0]["warnings"] == [
        "training steps are on 2 pairs in place of 3: per_device_train_batch_size times "
        "gradient_accumulation_steps is not a multiple of 2 processes"
    ]
    assert told[1]["warnings"] == []


def test_the_responses_of_two_processes_are_those_of_one(shared: tuple[Path, list[Any]]) -> None:
    wanted = json.loads(json.dumps(generate()))
    assert len(wanted) == 5
    assert [told["generated"] for told in shared[1]] == [wanted, wanted]


def test_functions_are_called_in_the_first_process_and_all_get_the_records(
    shared: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    records, calls = json.loads(json.dumps(rounds(tmp_path / "run")))
    (got, first), (other, none) = (told["rounds"] for told in shared[1])
    assert first == calls == ["evaluate", "generate", "label", "evaluate"] and none == []
    assert got == other and [r[:2] for r in got] == [r[:2] for r in records]
    assert (shared[0] / "run" / "round-000" / "adapter").exists()


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_engines_that_split_the_model_are_refused(tmp_path: Path, name: str) -> None:
    from activedpo_fast.training.data_parallel import require_whole_model
    from activedpo_fast.training.trl import dpo_config

    args = dpo_config(output_dir=str(tmp_path))
    require_whole_model(args)
    setattr(args, name, "full_shard")
    with pytest.raises(ActiveDPOError, match="leaves each process parts of the model"):
        require_whole_model(args)
