"""Trackers see one run through all rounds, also after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from activedpo_fast.training.energy import energy_counter, gpu_name, metered
from activedpo_fast.training.run_folder import read_records
from tests.support.runs import make_loop


class _Recorder(TrainerCallback):
    """A tracker that transformers makes by its name, as it makes those of other packages."""

    logged: ClassVar[list[tuple[str, int, int]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logged.append((args.run_name, state.global_step, id(self)))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[_Recorder]:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", _Recorder)
    _Recorder.logged.clear()
    return _Recorder


def _options(**more: Any) -> dict[str, Any]:
    return {"dpo_options": {"report_to": ["recorder"], "logging_steps": 1, **more}}


def test_steps_go_on_through_the_rounds(recorder: type[_Recorder], tmp_path: Path) -> None:
    make_loop(tmp_path / "mine", **_options()).run()
    assert [step for _, step, _ in recorder.logged] == [1, 2, 3, 4]
    assert {name for name, _, _ in recorder.logged} == {"mine"}
    assert len({tracker for *_, tracker in recorder.logged}) == 2  # each round has its trainer
    assert [r.training.get("steps") for r in read_records(tmp_path / "mine")] == [None, 2, 2]


def test_a_resumed_run_goes_on_where_it_was(recorder: type[_Recorder], tmp_path: Path) -> None:
    make_loop(tmp_path, rounds=1, **_options(run_name="given")).run()
    make_loop(tmp_path, rounds=2, **_options(run_name="given")).run()
    assert [(name, step) for name, step, _ in recorder.logged] == [
        ("given", step) for step in (1, 2, 3, 4)
    ]


def test_tensorboard_has_one_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"report_to": ["tensorboard"], "logging_steps": 1}
    make_loop(tmp_path / "mine", dpo_options=options).run()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    assert folder == tmp_path / "mine" / "trainer" / "runs" / "mine"
    found = EventAccumulator(str(folder))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4]


def test_without_a_gpu_there_is_no_energy() -> None:
    cpu = torch.device("cpu")
    assert gpu_name(cpu) == ""
    assert energy_counter(cpu) is None
    with metered(cpu) as energy:
        pass
    assert energy == {}


def test_without_nvidia_ml_py_there_is_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert energy_counter(torch.device("cuda")) is None
