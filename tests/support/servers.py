"""Small HTTP servers on 127.0.0.1, with a thread for each request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    """What a server was asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Reply:
    """What it answers: `body` as JSON, or bytes as they are; None hangs up without a word."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Server:
    """A running server: its address, its requests so far, and how many it had at once."""

    address: str
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def counting(self, request: Request) -> Iterator[None]:
        with self._lock:
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def serving(answer: Callable[[Request], Reply | None]) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            content = self.rfile.read(size)
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = json.loads(content) if content else None
            request = Request(self.command, self.path, headers, body)
            with server.counting(request):
                reply = answer(request)
            if reply is None:
                self.close_connection = True
                return
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = _answer

        def log_message(self, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = Server(f"http://127.0.0.1:{httpd.server_address[1]}")
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def chat_reply(content: str | None) -> Reply:
    """A response of OpenAI's chat completions with one choice."""
    return Reply(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "judge",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
    )


def responses_shown(request: Request) -> tuple[str, str]:
    """The two responses in a question of the default template, as A and B."""
    text = request.body["messages"][0]["content"]
    fence = text.split('"===== ')[1].split('"')[0]
    parts = text.split(f"\n===== {fence} ")
    a, b = (part.split("\n", 1)[1] for part in parts[2:4])
    return a, b


def prefers_longer(request: Request) -> Reply:
    """A judge that follows the protocol and prefers the longer response."""
    assert request.method == "POST" and request.path == "/v1/chat/completions"
    a, b = responses_shown(request)
    return chat_reply("tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B")
