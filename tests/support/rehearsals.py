"""Rehearsals of runs that are the same except for their folders, of which the first is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from activedpo_fast.training import loop


@pytest.fixture(scope="module", autouse=True)
def rehearsed_once() -> Iterator[None]:
    """Rehearse each kind of run once in a file that imports this fixture, and not for every test.

    A rehearsal costs as much as a round. Tests of rehearsals themselves do not import it.
    """
    rehearse = loop.rehearse
    succeeded: set[str] = set()

    def once(
        model: Any, tokenizer: Any, prompts: Any, selector: Any, args: Any, **how: Any
    ) -> None:
        kind = repr(
            (
                type(model),
                model.peft_config,
                model.get_base_model().config,
                str(tokenizer),
                tokenizer.chat_template,
                [prompt.prompt for prompt in prompts],
                selector.args,
                selector.strategy,
                {**args.to_dict(), "output_dir": None, "logging_dir": None},
                {name: value for name, value in how.items() if name != "processes"},
            )
        )
        if kind not in succeeded:
            rehearse(model, tokenizer, prompts, selector, args, **how)
            succeeded.add(kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "rehearse", once)
        yield
