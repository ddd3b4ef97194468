"""What every request to the page has to pass, whatever it asks for."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16 * 1024  # bytes; a comment has at most 2,000 characters

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware that lets only this page talk to the server.

    * `Host` has to be one of `hosts`: another name that resolves to this machine (DNS rebinding) is
      refused.
    * `Origin`, if there is one, has to be `http://` and that host.
    * Below `/api/`, `Sec-Fetch-Site` must not say that another site asks, and the header
      `Authorization: Bearer TOKEN` is needed, which no other site can send. The files of the page
      itself are no secret.
    * A body is JSON and has at most `MAX_BODY` bytes.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], token: str) -> None:
        self._app = app
        self._hosts = frozenset(hosts)
        self._credentials = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # start and end of the server; there are no WebSocket routes
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is None and scope["method"] == "POST":
            body = await _read_body(headers, receive)
            if body is None:
                refusal = (413, f"the body has more than {MAX_BODY} bytes, or is cut off")
            else:
                receive = _replay(body)
        if refusal is None:
            await self._app(scope, receive, send_guarded)
        else:
            status, reason = refusal
            await JSONResponse({"error": reason}, status)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if host not in self._hosts:
            return 421, "this server answers only to its own address"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return 403, "another site may not send requests here"
        if not scope["path"].startswith("/api/"):
            return None
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return 403, "another site may not send requests here"
        given = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self._credentials):
            return 401, "the token is wrong: open the address that the command printed"
        kind = headers.get("content-type", "").partition(";")[0].strip()
        if scope["method"] == "POST" and kind != "application/json":
            return 415, "the body has to be application/json"
        return None


async def _read_body(headers: Headers, receive: Receive) -> bytes | None:
    """Return the whole body; None if it is too large or cut off, without reading the rest."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        return None
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":  # what came so far may look like an answer
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return body


def _replay(body: bytes) -> Receive:
    """Return a `receive` with a body that has been read already."""
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return rest.pop() if rest else {"type": "http.disconnect"}

    return receive
