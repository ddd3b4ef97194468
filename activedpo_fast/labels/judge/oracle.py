"""A language model as the judge, through any server with OpenAI's chat completions."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activedpo_fast._checks import check_at_least
from activedpo_fast._files import FilePath, check_file_target, first_line
from activedpo_fast._printable import one_line
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.exchange.shown import as_shown
from activedpo_fast.labels.http import JsonServer, RequestRefused, key_from
from activedpo_fast.labels.journal import Journal
from activedpo_fast.labels.judge.asking import ask_all
from activedpo_fast.labels.judge.prompt import (
    ANSWERS,
    REMINDER,
    bounded,
    fill,
    parse,
    read_template,
)
from activedpo_fast.pool.messages import images_of
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.texts import canonical_json
from activedpo_fast.progress import progress_bar
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_PATH = "/chat/completions"
_LONGEST_REPLY = 500  # characters of a reply that are kept
_NO_ANSWER = f"not {ANSWERS[0]}, {ANSWERS[1]} or {ANSWERS[2]}"


@dataclass(frozen=True)
class _Question:
    """A pick with one of its responses as A: `first` is its position.

    `key` is a hash of the whole request, under which the answer is kept.
    """

    id: str
    first: int
    text: str
    key: str


class JudgeOracle:
    """Labels from a language model, asked through a chat-completions server about each pair.

    Each pair is asked in both orders at temperature 0. If the two answers mean the same response,
    it is preferred. Otherwise, and if the judge says "tie", the pair has no preference (None). A
    reply that is not exactly A, B or tie is asked about again, `attempts` times in all; then the
    pair is skipped (None), and so is a pair that the server refuses, such as one that is too long
    for the model. A line in the log counts ties and skips.

    Answers are appended to `journal`, and are on disk before the next question is asked. What the
    journal already has, for the same model, template and texts, is not asked again, except if no
    pair of a selection got a label or a tie: then what had no answer is.

    Args:
        model: the model's name at the server.
        base_url: the server's address before `/chat/completions`, such as
            `http://localhost:8000/v1` (vLLM, llama.cpp, TGI, Ollama, OpenAI, ...).
        journal: the file of answers; several selections, and a run's rounds, share it.
        api_key_env: the environment variable that has the key. Default: no key is sent.
        template: a text file with {prompt}, {response_a}, {response_b} and, if wanted, {fence},
            a line's mark that no text can hold. Default: `judge.prompt.DEFAULT_TEMPLATE`.
        max_tokens: of a reply; models that reason in their reply need more.
        max_chars: of the prompt and of each response; longer ones are cut, which is logged.
        attempts: replies to one question, until it is A, B or tie.
        extra_body: more fields of the request, such as
            `{"chat_template_kwargs": {"enable_thinking": False}}`. None leaves a field out:
            `{"max_tokens": None, "max_completion_tokens": 500, "temperature": None}`. Recorded with
            a run: no keys belong here.
        concurrency: requests at once.
        timeout: seconds for one request.
        retries: how often a request is sent again after a connection error, a timeout, or the
            status 408, 425, 429 or 5xx. `Retry-After` is honored.

    Raises:
        ActiveDPOError: bad options, or the environment variable is not set. From `label`: the
            server cannot be reached, refuses the key or fails; no pair got an answer.

    Examples:
        >>> from activedpo_fast.labels import JudgeOracle
        >>> oracle = JudgeOracle("judge", base_url=judge_url, journal="judge.jsonl")
        >>> labels = oracle.label(picked)
        >>> len(labels) == len(picked)
        True
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        journal: FilePath,
        api_key_env: str | None = None,
        template: str | None = None,
        max_tokens: int = 16,
        max_chars: int = 20_000,
        attempts: int = 3,
        extra_body: dict[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        show_progress: bool | None = None,
    ) -> None:
        check_at_least(
            1,
            max_tokens=max_tokens,
            max_chars=max_chars,
            attempts=attempts,
            concurrency=concurrency,
        )
        key = None if api_key_env is None else key_from(api_key_env)
        self._server = JsonServer(
            base_url,
            name="judge",
            headers={"Authorization": f"Bearer {key}"} if key else None,
            secrets=(key,) if key else (),
            timeout=timeout,
            retries=retries,
        )
        check_file_target(journal)
        self._journal = Journal(Path(journal))
        self._lock = threading.Lock()
        self._known: dict[str, str | None] = {}
        self._body = _fixed_body(model, max_tokens, extra_body)
        self._concurrency = concurrency
        self._show_progress = show_progress
        # A run records these.
        self.request = canonical_json(self._body).decode()
        self.template = read_template(template)
        self.max_chars = max_chars
        self.attempts = attempts

    def label(
        self, selection: Selection, pool: PreferencePool | datasets.Dataset | None = None
    ) -> list[int | None]:
        if not selection:
            return []
        self._log_cuts(selection)
        pairs = [(self._question(pick, 0), self._question(pick, 1)) for pick in selection]
        refused = self._ask_what_is_unknown(pairs)
        answers = [
            tuple(self._response_meant(question, refused) for question in pair) for pair in pairs
        ]
        self._report(answers, refused)
        return [_agreed(pair) for pair in answers]

    def rehearse(self) -> None:
        """Ask one question about two made-up responses, and warn if the reply is no answer.

        Raises:
            ActiveDPOError: as `label`; the request itself is refused.
        """
        pick = Pick("rehearsal", (0, 1), 0.0, 0, "What is 2 + 3?", ("5", "I do not know."))
        reply = self._reply([_message("user", self._question(pick, 0).text)], threading.Event())
        if parse(reply) is None:
            logger.warning(
                "judge %s: the reply to a simple comparison is %s: %s; pairs with such replies are "
                "skipped",
                self._server.base_url,
                _NO_ANSWER,
                one_line(repr(reply[:100])),
            )

    # -- asking ----------------------------------------------------------------------------------

    def _question(self, pick: Pick, first: int) -> _Question:
        if images_of(pick.prompt):
            raise ActiveDPOError(
                f"id {pick.id!r}: the prompt has images, and the judge is sent texts alone: let "
                "people label it"
            )
        a, b = pick.responses[first], pick.responses[1 - first]
        text = fill(self.template, pick.prompt, a, b, self.max_chars)
        body = {**self._body, "messages": [_message("user", text)]}
        key = hashlib.sha256(canonical_json(body)).hexdigest()[:32]
        return _Question(pick.id, first, text, key)

    def _ask_what_is_unknown(self, pairs: Sequence[tuple[_Question, _Question]]) -> dict[str, str]:
        """Ask, and return the server's reasons for refusing questions, by key."""
        questions = [one for pair in pairs for one in pair]
        self._journal.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self._journal.locked() as entries:
            self._remember(entries)
        unknown = {one.key: one for one in questions if one.key not in self._known}
        if not unknown and not any(all(self._known[one.key] for one in pair) for pair in pairs):
            # That ended in an error: the server may have been mended since.
            unknown = {one.key: one for one in questions if self._known[one.key] is None}
        refused: dict[str, str] = {}

        def ask(question: _Question, stop: threading.Event) -> None:
            try:
                self._ask(question, stop)
            except RequestRefused as error:
                refused[question.key] = str(error)

        with progress_bar(
            self._show_progress, total=len(questions), desc="judge", unit="answer"
        ) as bar:
            bar.update(len(questions) - len(unknown))
            for _ in ask_all(list(unknown.values()), ask, concurrency=self._concurrency):
                bar.update()
        return refused

    def _ask(self, question: _Question, stop: threading.Event) -> None:
        messages = [_message("user", question.text)]
        replies: list[str] = []
        answer = None
        while answer is None and len(replies) < self.attempts:
            if replies:
                messages += [_message("assistant", replies[-1] or "-"), _message("user", REMINDER)]
            reply = self._reply(messages, stop)
            answer = parse(reply)
            replies.append(bounded(reply, _LONGEST_REPLY))
        entry = {
            "key": question.key,
            "id": question.id,
            "first": question.first,
            "answer": answer,
            "replies": replies,
        }
        with self._lock, self._journal.locked() as entries:
            self._remember(entries)
            # Another process may have been faster: the first answer counts.
            if question.key not in self._known or (answer and not self._known[question.key]):
                self._journal.append(entry)
                self._remember([entry])

    def _reply(self, messages: Sequence[Mapping[str, str]], stop: threading.Event) -> str:
        """Return the text of the server's reply; "" if it has none, as of a filtered one."""
        value = self._server.request("POST", _PATH, {**self._body, "messages": messages}, stop=stop)
        try:
            content = value["choices"][0]["message"].get("content")
        except (LookupError, TypeError, AttributeError):
            said = self._server.shown(json.dumps(value))
            raise ActiveDPOError(
                f"judge {self._server.base_url}: the response has no choices[0].message, it is "
                f"{said}: is it a chat-completions server?"
            ) from None
        if content is not None and not isinstance(content, str):
            raise ActiveDPOError(f"judge {self._server.base_url}: the reply's content is no text")
        # A lone half of a surrogate pair can be in JSON, but in no file.
        return (content or "").encode(errors="replace").decode()

    def _remember(self, entries: Sequence[Mapping[str, Any]]) -> None:
        for entry in entries:
            answer = entry.get("answer")
            if not isinstance(entry.get("key"), str) or answer not in (*ANSWERS, None):
                raise ActiveDPOError(
                    f"{self._journal.path}: an entry is not an answer of a judge: it is another "
                    "file, or was changed by hand"
                )
            self._known[entry["key"]] = self._known.get(entry["key"]) or answer

    # -- answers to labels -----------------------------------------------------------------------

    def _response_meant(self, question: _Question, refused: Mapping[str, str]) -> int | str | None:
        """Return the position of the preferred response, "tie", or None for no answer."""
        answer = None if question.key in refused else self._known[question.key]
        if answer in ("A", "B"):
            return question.first if answer == "A" else 1 - question.first
        return answer

    def _report(
        self, answers: Sequence[tuple[int | str | None, ...]], refused: Mapping[str, str]
    ) -> None:
        kinds = Counter(map(_kind, answers))
        if kinds["skipped"] == len(answers):
            reason = next(iter(refused.values()), None) or (
                f"judge {self._server.base_url}: the replies are {_NO_ANSWER}; see "
                f"{self._journal.path}"
            )
            raise ActiveDPOError(
                f"{reason}: none of the {len(answers)} pairs has a label; change the judge or its "
                "settings and run again"
            )
        logger.info(
            "judge: %d of %d pairs have a preference; %d ties, of which the order of the responses "
            "decided %d; %d skipped",
            kinds["preferred"],
            len(answers),
            kinds["tied"] + kinds["order"],
            kinds["order"],
            kinds["skipped"],
        )
        if refused:
            logger.warning(
                "%d questions were refused, the first: %s",
                len(refused),
                next(iter(refused.values())),
            )

    def _log_cuts(self, selection: Selection) -> None:
        texts = [text for pick in selection for text in (pick.prompt, *pick.responses)]
        cut = sum(len(as_shown(text)) > self.max_chars for text in texts)
        if cut:
            logger.warning(
                "judge: %d of %d texts have more than %d characters (max_chars) and are cut",
                cut,
                len(texts),
                self.max_chars,
            )


def _agreed(answers: tuple[int | str | None, ...]) -> int | None:
    first, second = answers
    return first if isinstance(first, int) and first == second else None


def _kind(answers: tuple[int | str | None, ...]) -> str:
    if None in answers:
        return "skipped"
    if _agreed(answers) is not None:
        return "preferred"
    return "order" if set(answers) == {0, 1} else "tied"


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _fixed_body(
    model: str, max_tokens: int, extra_body: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the fields that all requests share."""
    if not isinstance(model, str) or not model:
        raise ActiveDPOError("model: expected the name of a model")
    if not isinstance(extra_body, Mapping | None):
        raise ActiveDPOError("extra_body: expected names and values")
    extra = dict(extra_body or {})
    for name in ("model", "messages", "stream", "n"):
        if name in extra:
            raise ActiveDPOError(f"extra_body: {name!r} cannot be set there")
    body = {"model": model, "temperature": 0, "max_tokens": max_tokens, **extra}
    body = {name: value for name, value in body.items() if value is not None}
    try:
        json.dumps(body, allow_nan=False, sort_keys=True, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ActiveDPOError(
            f"model, extra_body: not what JSON can hold: {first_line(error)}"
        ) from None
    return body
