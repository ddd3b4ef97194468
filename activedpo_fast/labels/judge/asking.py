"""Asking many questions at once, in a bounded number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

Question = TypeVar("Question")


def ask_all(
    questions: Sequence[Question],
    ask: Callable[[Question, threading.Event], None],
    *,
    concurrency: int,
) -> Iterator[None]:
    """Call `ask(question, stop)` for all questions, and yield once for each that is done.

    If one raises, or the caller leaves, `stop` is set: no other question is begun. Those that a
    server is working on are not waited for, but end as they would: the threads are daemons.
    """
    waiting: SimpleQueue[Question] = SimpleQueue()
    for question in questions:
        waiting.put(question)
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                question = waiting.get_nowait()
            except Empty:
                return
            try:
                ask(question, stop)
            except BaseException as error:
                done.put(error)
                return
            done.put(None)

    for n in range(min(concurrency, len(questions))):
        threading.Thread(target=work, name=f"activedpo-judge-{n}", daemon=True).start()
    try:
        for _ in questions:
            error = done.get()
            if error is not None:
                raise error
            yield
    finally:
        stop.set()
