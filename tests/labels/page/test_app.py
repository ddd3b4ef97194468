"""The web application: what it answers, what is on disk by then, and what it refuses."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import pytest

pytest.importorskip("starlette")
pytest.importorskip("markdown_it")
pytest.importorskip("httpx2", reason="Starlette's TestClient needs httpx2")

from starlette.testclient import TestClient  # noqa: E402

from activedpo_fast.labels.files import labels_file  # noqa: E402
from activedpo_fast.labels.page import writing  # noqa: E402
from activedpo_fast.labels.page.app import make_app  # noqa: E402
from activedpo_fast.labels.page.security import MAX_BODY  # noqa: E402
from activedpo_fast.labels.page.server import hosts_of, serve  # noqa: E402
from activedpo_fast.labels.page.session import Session  # noqa: E402
from tests.support.labeling import open_labeling, plain_picks, write_picks  # noqa: E402

HOST, TOKEN = "127.0.0.1:8765", "a-token"
SIGNED = {"Authorization": f"Bearer {TOKEN}"}


def _client(path: Path, labeler: str = "ann", finished: list | None = None) -> TestClient:
    app = make_app(
        Session(open_labeling(path), labeler),
        hosts=[HOST, "localhost:8765"],
        token=TOKEN,
        finish=lambda: (finished if finished is not None else []).append(True),
    )
    return TestClient(app, base_url=f"http://{HOST}", headers=SIGNED)


@pytest.fixture(autouse=True)
def every_write_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels file follows every answer, however slow the machine is."""
    monkeypatch.setattr(writing, "_QUICK", math.inf)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_picks(tmp_path / "picked.jsonl", plain_picks(3))


@pytest.fixture
def client(path: Path) -> Iterator[TestClient]:
    with _client(path) as client:
        yield client


def _answer(pair: int, choice: str = "left", **more: object) -> dict:
    return {"pair": pair, "choice": choice, "seconds": 1.5, "strength": None, "comment": "", **more}


def _journal(path: Path) -> list[dict]:
    journal = labels_file(path).with_name("labels-picked.journal.jsonl")
    return [json.loads(line) for line in journal.open()] if journal.exists() else []


def test_all_pairs_are_answered_in_turn(path: Path) -> None:
    finished: list[bool] = []
    client = _client(path, finished=finished)
    state = client.get("/api/pair").json()
    assert (state["done"], state["left"], state["seconds"]) == (0, 3, None)
    for n, choice in enumerate(("left", "tie", "right")):
        pair = state["pair"]
        assert pair["number"] == n
        assert pair["prompt"][0]["text"] == f"Question {n}?"
        assert {pair["left"][0]["text"], pair["right"][0]["text"]} == {f"Good {n}.", f"Bad {n}."}
        preferred = pair[choice][0]["text"] if choice != "tie" else None
        state = client.post("/api/answer", json=_answer(n, choice)).json()
        answer = [entry for entry in _journal(path) if entry["kind"] == "answer"][-1]
        expected = {f"Good {n}.": 0, f"Bad {n}.": 1, None: "tie"}[preferred]
        assert (answer["pair"], answer["label"]) == (n, expected)
        written = [json.loads(line) for line in labels_file(path).open()]
        assert written[n]["label"] == expected
        assert [record["label"] for record in written[n + 1 :]] == [None] * (2 - n)
    assert (state["pair"], state["done"], state["left"], state["seconds"]) == (None, 3, 0, 1.5)
    assert "3 of 3 pairs have a label" in state["report"]
    assert client.post("/api/finish", json={}).json() == {} and finished == [True]


def test_undo_shows_the_pair_again_with_what_was_said(client: TestClient, path: Path) -> None:
    client.post("/api/answer", json=_answer(0, strength=2, comment="why"))
    state = client.post("/api/undo", json={}).json()
    assert state["pair"]["number"] == 0 and state["done"] == 0
    assert state["undone"] == {"strength": 2, "comment": "why"}
    assert json.loads(labels_file(path).open().readline())["label"] is None
    nothing = client.post("/api/undo", json={})
    assert nothing.status_code == 409 and nothing.json()["pair"]["number"] == 0
    assert "no answer to take back" in nothing.json()["error"]


def test_a_second_answer_to_a_pair_is_refused_and_the_next_is_shown(client: TestClient) -> None:
    client.post("/api/answer", json=_answer(0))
    again = client.post("/api/answer", json=_answer(0, "right"))
    assert again.status_code == 409
    assert again.json()["pair"]["number"] == 1 and "already answered" in again.json()["error"]


def test_differences_of_the_sides_as_they_are_shown(client: TestClient) -> None:
    pair = client.get("/api/pair").json()["pair"]
    found = client.get("/api/differences/0").json()
    for side in ("left", "right"):
        assert "".join(text for text, _ in found[side]) == pair[side][0]["text"]
        assert [differs for _, differs in found[side]] == [True, False]
    assert client.get("/api/differences/3").status_code == 400
    assert client.get("/api/differences/x").status_code == 400
    assert client.get(f"/api/differences/{'9' * 5000}").status_code == 400


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pair": 3}, "pair: expected a number from 0 to 2"),
        ({"pair": -1}, "pair: expected"),
        ({"pair": "../0"}, "pair: expected"),
        ({"pair": True}, "pair: expected"),
        ({"choice": "both"}, "choice: 'both' is none of left, right, tie, skip"),
        ({"choice": ["left"]}, "choice: "),
        ({"strength": 4}, "strength: expected"),
        ({"strength": True}, "strength: expected"),
        ({"strength": {}}, "strength: expected"),
        ({"strength": 1.0}, "strength: expected"),
        ({"seconds": -1}, "seconds: expected"),
        ({"seconds": "1"}, "seconds: expected"),
        ({"seconds": 1e999}, "seconds: expected"),
        ({"comment": None}, "comment: expected"),
        ({"comment": "x" * 2001}, "comment: expected"),
        ({"comment": "\ud800"}, "comment: the text has half of a surrogate pair"),
    ],
)
def test_answers_that_the_page_does_not_send(
    client: TestClient, path: Path, change: dict, error: str
) -> None:
    body = json.dumps({**_answer(0), **change})
    refused = client.post("/api/answer", content=body, headers={"Content-Type": "application/json"})
    assert refused.status_code == 400
    assert refused.json()["error"].startswith(error)
    assert _journal(path) == []


@pytest.mark.parametrize("body", ["", "{", "[]", "1", "null", "[" * 10_000])
def test_bodies_that_are_no_object(client: TestClient, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert client.post("/api/answer", content=body, headers=headers).status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer another"}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Authorization": "Bearer \u00e4".encode("latin-1")}, 401),
        ({"Host": "evil.test"}, 421),
        ({"Host": "127.0.0.1:1"}, 421),
        ({"Host": "127.0.0.1"}, 421),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "https://127.0.0.1:8765"}, 403),
        ({"Origin": "http://localhost:8765"}, 403),  # another origin than the Host says
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_requests_of_others_are_refused(
    client: TestClient, path: Path, headers: dict, status: int
) -> None:
    given = {"Content-Type": "application/json", **headers}
    body = json.dumps(_answer(0))
    for url in ("/api/answer", "/api/undo", "/api/finish"):
        refused = client.post(url, content=body, headers=given)
        assert refused.status_code == status
        assert refused.json().keys() == {"error"}
    if status != 415:
        assert client.get("/api/pair", headers=given).status_code == status
    assert _journal(path) == []


def test_requests_of_the_page_pass_from_both_names(client: TestClient) -> None:
    for host in (HOST, "localhost:8765"):
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert client.get("/api/pair", headers=headers).status_code == 200
        assert client.post("/api/undo", json={}, headers=headers).status_code == 409


def test_large_bodies_are_refused_before_they_are_read(client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    large = b" " * (MAX_BODY + 1)
    assert client.post("/api/answer", content=large, headers=headers).status_code == 413

    chunks = (b" " * 1024 for _ in range(MAX_BODY // 1024 + 1))  # no Content-Length
    assert client.post("/api/answer", content=chunks, headers=headers).status_code == 413
    fits = json.dumps(_answer(0)).encode().ljust(MAX_BODY)
    assert client.post("/api/answer", content=fits, headers=headers).status_code == 200


def test_long_times_are_cut(client: TestClient, path: Path) -> None:
    assert client.post("/api/answer", json=_answer(0, seconds=10**400)).status_code == 200
    assert [e["seconds"] for e in _journal(path) if e["kind"] == "answer"] == [86_400.0]


def test_a_body_that_is_cut_off_is_no_answer(path: Path) -> None:
    address: Queue[str] = Queue()
    arguments = {"ready": address.put}
    thread = threading.Thread(
        target=serve, args=(Session(open_labeling(path), "ann"),), kwargs=arguments
    )
    thread.start()
    base, token = address.get(timeout=120).split("/#")
    port = int(base.rpartition(":")[2])

    def send(url: str, body: bytes, length: int) -> bytes:
        head = (
            f"POST {url} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
            connection.sendall(head.encode() + body)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b""))

    body = json.dumps(_answer(0)).encode()
    try:
        assert b" 200 " not in send("/api/answer", body, len(body) + 1)
    finally:
        # With SHUT_WR the connection counts as gone: the request is served all the same.
        send("/api/finish", b"{}", 2)
        thread.join(timeout=120)
    assert not thread.is_alive()
    assert [entry for entry in _journal(path) if entry["kind"] == "answer"] == []


def test_hosts_are_what_browsers_send() -> None:
    assert hosts_of(8765) == ["127.0.0.1:8765", "localhost:8765"]
    assert {"127.0.0.1", "localhost"} < set(hosts_of(80))


def test_the_files_of_the_page_need_no_token_and_no_other_path_is_served(
    client: TestClient, path: Path
) -> None:
    for url, kind in (
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
    ):
        served = client.get(url, headers={"Authorization": ""})
        assert (served.status_code, served.headers["content-type"]) == (200, kind)
        policy = served.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert served.headers["referrer-policy"] == "no-referrer"
        assert TOKEN not in served.text and str(path) not in served.text
    # A link in another page may lead here: the token comes with it, or nothing is shown.
    html = client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).text
    assert "<title>Label pairs</title>" in html
    assert "style=" not in html and "onclick" not in html and "<script>" not in html
    assert "http" not in html.replace("http-equiv", "")  # nothing from elsewhere
    for url in (
        "/../app.py",
        "/%2e%2e/app.py",
        "/static/page.js",
        "/page.js/..%2fapp.py",
        "//etc/passwd",
    ):
        refused = client.get(url)
        assert refused.status_code == 404, url
        assert "content-security-policy" in refused.headers
    assert client.get("/api/answer").status_code == 405
