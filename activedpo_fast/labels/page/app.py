"""The web application of the page: its four files, and what its script asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.page.answers import Answer
from activedpo_fast.labels.page.report import report
from activedpo_fast.labels.page.security import Guard
from activedpo_fast.labels.page.session import CHOICES, AlreadyAnswered, Session
from activedpo_fast.labels.page.texts import differences, messages
from activedpo_fast.labels.page.writing import LabelsWriter
from activedpo_fast.pool.texts import check_string

MAX_COMMENT = 2000  # characters
_DAY = 86_400.0  # seconds

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class BadRequest(ActiveDPOError):
    """A request that the page does not send."""


class PageApp:
    """What the script of the page asks for, answered by a `Session`.

    Every answer is on disk before its response is sent. The labels file is written after it, by the
    server's one thread, like everything that uses the session.
    """

    def __init__(self, session: Session, finish: Callable[[], None]) -> None:
        self._session = session
        self._finish = finish
        self._labels = LabelsWriter(session.labeling.write_labels)

    async def current(self, request: Request) -> Response:
        return self._page(self._session.current())

    async def answer(self, request: Request) -> Response:
        given = await _body(request)
        pair = self._pair(given.get("pair"))
        choice, strength = given.get("choice"), given.get("strength")
        if choice not in CHOICES:
            raise BadRequest(f"choice: {choice!r} is none of {', '.join(CHOICES)}")
        if strength is not None and (type(strength) is not int or strength not in (1, 2, 3)):
            raise BadRequest("strength: expected 1, 2, 3 or null")
        seconds, comment = _seconds(given.get("seconds")), _comment(given.get("comment"))
        try:
            following = self._session.answer(
                pair, choice, seconds=seconds, strength=strength, comment=comment
            )
        except AlreadyAnswered as error:
            return self._page(self._session.current(), status=409, error=str(error))
        except ActiveDPOError as error:
            return _not_saved("The answer", error)
        return self._page(following, changed=True)

    async def undo(self, request: Request) -> Response:
        try:
            undone = self._session.undo()
        except ActiveDPOError as error:
            return _not_saved("Taking it back", error)
        if undone is None:
            return self._page(
                self._session.current(), status=409, error="there is no answer to take back"
            )
        return self._page(undone.pair, undone, changed=True)

    async def compare(self, request: Request) -> Response:
        number = request.path_params["pair"]
        pair = self._pair(int(number) if number.isdecimal() and len(number) < 20 else None)
        left, right = differences(*self._sides(pair))
        return JSONResponse({"left": left, "right": right})

    async def finish(self, request: Request) -> Response:
        return JSONResponse({}, background=BackgroundTask(self._finish))

    def _page(
        self,
        pair: int | None,
        undone: Answer | None = None,
        *,
        changed: bool = False,
        status: int = 200,
        error: str | None = None,
    ) -> Response:
        """Return the pair to show and the progress; the report if no pair is left."""
        progress = self._session.progress()
        shown: dict[str, Any] = {
            "pair": None if pair is None else self._view(pair),
            "question": self._session.question,
            "labeler": self._session.labeler,
            "done": progress.done,
            "left": progress.left,
            "seconds": progress.seconds,
        }
        if pair is None:
            shown["report"] = report(self._session.labeling)
        if undone is not None:
            shown["undone"] = {"strength": undone.strength, "comment": undone.comment}
        if error is not None:
            shown["error"] = error
        write = BackgroundTask(self._labels.changed) if changed else None
        return JSONResponse(shown, status, background=write)

    def _view(self, pair: int) -> dict[str, Any]:
        left, right = self._sides(pair)
        pick = self._session.labeling.batch.picks[pair]
        return {
            "number": pair,
            "prompt": messages(pick.prompt, f"id {pick.id!r}"),
            "left": messages(left),
            "right": messages(right),
        }

    def _sides(self, pair: int) -> tuple[Any, Any]:
        responses = self._session.labeling.batch.picks[pair].responses
        left = self._session.left(pair)
        return responses[left], responses[1 - left]

    def _pair(self, number: Any) -> int:
        known = len(self._session.labeling.batch.picks)
        if type(number) is not int or not 0 <= number < known:
            raise BadRequest(f"pair: expected a number from 0 to {known - 1}")
        return number


def make_app(
    session: Session, *, hosts: Collection[str], token: str, finish: Callable[[], None]
) -> Starlette:
    """Return the application for one labeler.

    Args:
        hosts: the values of `Host` that are accepted, such as "127.0.0.1:8765".
        token: what the page has to send with every request.
        finish: called when the labeler says that they are done; it should stop the server.
    """
    page = PageApp(session, finish)
    return Starlette(
        routes=[
            *(_file_route(path, *file) for path, file in _FILES.items()),
            Route("/api/pair", page.current, methods=["GET"]),
            Route("/api/answer", page.answer, methods=["POST"]),
            Route("/api/undo", page.undo, methods=["POST"]),
            Route("/api/differences/{pair}", page.compare, methods=["GET"]),
            Route("/api/finish", page.finish, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, hosts=hosts, token=token)],
        exception_handlers={BadRequest: _bad_request, ActiveDPOError: _failed},
    )


def _file_route(path: str, name: str, kind: str) -> Route:
    """Serve a file of the package from memory: no request chooses a path on the disk."""
    content = files("activedpo_fast.labels.page").joinpath("static", name).read_bytes()

    async def serve(request: Request) -> Response:
        return Response(content, media_type=kind)

    return Route(path, serve, methods=["GET"])


async def _body(request: Request) -> dict[str, Any]:
    try:
        given = await request.json()
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(given, dict):
        raise BadRequest("the body is not a JSON object")
    return given


def _comment(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_COMMENT:
        raise BadRequest(f"comment: expected a text of at most {MAX_COMMENT} characters")
    try:
        check_string(value, "the text", "comment")
    except ActiveDPOError as error:
        raise BadRequest(str(error)) from None
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest("seconds: expected a number")
    if not 0 <= value < math.inf:  # nor NaN; integers may be too large for a float
        raise BadRequest("seconds: expected a finite number from 0")
    return float(min(value, _DAY))


def _not_saved(what: str, error: ActiveDPOError) -> Response:
    """Return what the page shows beside the pair, which stays in sight."""
    return JSONResponse(
        {"error": f"{what} was not saved: {error}. Try again when that is mended."}, 500
    )


async def _bad_request(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 500)
