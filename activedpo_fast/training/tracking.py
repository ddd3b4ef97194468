"""One run of TensorBoard, wandb or trackio through all rounds, each with its own trainer."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl import DPOConfig


def track_as_one_run(trainer: Any, args: DPOConfig, steps_before: int) -> None:
    """Let the trackers of `args.report_to` go on where the trainer of the last round stopped.

    Steps are counted on from `steps_before`, and all rounds have one name: `args.run_name`, or that
    of the folder above `args.output_dir`. TensorBoard's files are then in one folder,
    `output_dir/runs/<name>`; trackio and wandb resume the run of that name (wandb within a process;
    for another process, set WANDB_RUN_ID and WANDB_RESUME=allow, as wandb says).
    """
    from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

    trackers = tuple(get_reporting_integration_callbacks(args.report_to))
    named = copy.copy(args)
    output_dir = args.output_dir or "trainer_output"
    folder = os.path.abspath(output_dir)
    named.run_name = args.run_name or os.path.basename(os.path.dirname(folder)) or "active-dpo"
    handler = trainer.callback_handler
    for n, callback in enumerate(handler.callbacks):
        if isinstance(callback, trackers):
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(output_dir, "runs", named.run_name)
            handler.callbacks[n] = _Continued(callback, named, steps_before)


class _Continued:
    """A callback that sees the steps of all rounds and the common name."""

    def __init__(self, callback: Any, args: DPOConfig, steps_before: int) -> None:
        self._callback = callback
        self._args = args
        self._steps_before = steps_before

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._callback, name)
        if not name.startswith("on_"):
            return method
        event: Callable[..., Any] = method

        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            state = copy.copy(state)
            state.global_step += self._steps_before
            return event(self._args, state, control, **kwargs)

        return call
