"""Labels through Label Studio's HTTP API, against a server that implements it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels import FileOracle, LabelsPending, LabelStudioOracle
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.result import Selection
from tests.support.label_studio import LEGACY, PERSONAL, LabelStudio
from tests.support.servers import Reply, Request, Server, serving


@pytest.fixture(autouse=True)
def token(monkeypatch: Any) -> None:
    monkeypatch.setenv("TOKEN", LEGACY)


def _selection(name: str = "p", n: int = 3) -> Selection:
    return Selection(
        tuple(
            Pick(f"{name}{i}", (0, 1), 1.0, i, f"Question {i}?", (f"good {name}", f"bad {i}"))
            for i in range(n)
        ),
        "random",
    )


def _oracle(server: Server, folder: Path, **options: Any) -> LabelStudioOracle:
    given = {"base_url": server.address, "api_key_env": "TOKEN", "retries": 0, **options}
    return LabelStudioOracle(folder, **given)


def _good(data: dict[str, Any]) -> str:
    return "left" if data["left"].startswith("good") else "right"


@pytest.mark.parametrize("key", [LEGACY, PERSONAL])
def test_pairs_are_posted_once_and_their_labels_read(
    tmp_path: Path, monkeypatch: Any, key: str
) -> None:
    monkeypatch.setenv("TOKEN", key)
    studio = LabelStudio()
    with serving(studio) as server:
        for _ in range(2):  # again: a rerun of the loop, in another process
            with pytest.raises(LabelsPending) as pending:
                _oracle(server, tmp_path, title="activedpo: run").label(_selection())
            assert str(pending.value) == (
                f"3 of 3 pairs have no answer yet: label them at {server.address}/projects/7, then "
                "run again"
            )
        assert [len(tasks) for tasks in studio.tasks.values()] == [3]
        assert studio.projects[7]["title"] == "activedpo: run"
        assert "<Pairwise" in studio.projects[7]["label_config"]
        studio.annotate(lambda data: None if data["pick_id"] == "p2" else _good(data))
        with pytest.raises(LabelsPending, match="1 of 3 pairs"):
            _oracle(server, tmp_path).label(_selection())
        studio.annotate(lambda data: "tie" if data["pick_id"] == "p2" else None)
        assert _oracle(server, tmp_path).label(_selection()) == [0, 0, None]
        # The next round goes to the same project; its export has both rounds.
        with pytest.raises(LabelsPending, match="2 of 2 pairs"):
            _oracle(server, tmp_path).label(_selection("q", 2))
        studio.annotate(lambda data: "right" if data["pick_id"][0] == "q" else None)
        second = _oracle(server, tmp_path).label(_selection("q", 2))
        assert len(studio.projects) == 1 and len(studio.tasks[7]) == 5
    sides = [task["data"]["left"].startswith("bad") for task in studio.tasks[7][3:]]
    assert second == [0 if bad_left else 1 for bad_left in sides]
    # All is on disk: nobody is asked any more, and the files are those of FileOracle.
    assert _oracle(server, tmp_path).label(_selection()) == [0, 0, None]
    assert FileOracle(tmp_path).label(_selection()) == [0, 0, None]
    for path in tmp_path.iterdir():
        assert key not in path.read_text()


def test_several_answers_are_combined_and_skips_are_no_preference(tmp_path: Path) -> None:
    studio = LabelStudio()
    with serving(studio) as server:
        with pytest.raises(LabelsPending):
            _oracle(server, tmp_path).label(_selection())
        studio.annotate(_good, labeler=1)
        studio.annotate(_good, labeler=2)
        studio.annotate(lambda data: "left" if data["pick_id"] == "p1" else "right", labeler=3)
        assert _oracle(server, tmp_path).label(_selection()) == [0, 0, 0]
    other = LabelStudio()
    with serving(other) as server:
        folder = tmp_path / "other"
        with pytest.raises(LabelsPending):
            _oracle(server, folder).label(_selection())
        other.annotate(_good, cancelled=True)  # Label Studio's own button
        assert _oracle(server, folder).label(_selection()) == [None] * 3


def test_answers_that_cannot_be_used_are_set_aside_and_asked_for_again(
    tmp_path: Path, caplog: Any
) -> None:
    studio = LabelStudio()
    with serving(studio) as server:
        with pytest.raises(LabelsPending):
            _oracle(server, tmp_path).label(_selection())
        studio.annotate(lambda data: "nothing" if data["pick_id"] == "p1" else _good(data))
        with pytest.raises(LabelsPending, match=r"no answer that can be used, see .*set-aside-"):
            _oracle(server, tmp_path).label(_selection())
        assert "1 answers are set aside" in caplog.text
        (aside,) = tmp_path.glob("set-aside-*.jsonl")
        assert "no answer" in json.loads(aside.read_text())["reason"]
        studio.annotate(lambda data: _good(data) if data["pick_id"] == "p1" else None)
        assert _oracle(server, tmp_path).label(_selection()) == [0, 0, 0]


def test_a_post_that_was_cut_short_is_completed(tmp_path: Path) -> None:
    studio = LabelStudio(takes=2)
    with serving(studio) as server:
        with pytest.raises(ActiveDPOError, match="it took 2 of 3 tasks"):
            _oracle(server, tmp_path).label(_selection())
        studio.takes = None
        with pytest.raises(LabelsPending, match="3 of 3"):
            _oracle(server, tmp_path).label(_selection())
    ids = [task["data"]["pick_id"] for task in studio.tasks[7]]
    assert sorted(ids) == ["p0", "p1", "p2"]


def test_what_would_be_done_twice_is_not_sent_again(tmp_path: Path) -> None:
    studio = LabelStudio()

    def broken(request: Request) -> Reply:
        done = studio(request)
        return Reply({}, 502) if request.method == "POST" else done

    with serving(broken) as server:
        with pytest.raises(ActiveDPOError, match="Label Studio .*: status 502"):
            _oracle(server, tmp_path, retries=3).label(_selection())
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "retries: -1 is below 0"),
        ({"timeout": float("nan")}, "timeout: nan is not above 0"),
        ({"api_key_env": 5}, "api_key_env: expected the name"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ActiveDPOError, match=message):
        LabelStudioOracle(
            tmp_path, **{"base_url": "http://localhost", "api_key_env": "TOKEN", **options}
        )


@pytest.mark.parametrize("key", ["f" * 40, "a.b.c"])
def test_a_refused_token_is_said_and_not_shown(tmp_path: Path, monkeypatch: Any, key: str) -> None:
    monkeypatch.setenv("TOKEN", key)
    with serving(LabelStudio()) as server:
        with pytest.raises(ActiveDPOError, match="the key is missing or refused") as caught:
            _oracle(server, tmp_path).rehearse()
    assert key not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [LEGACY, PERSONAL])
def test_a_rehearsal_changes_nothing(tmp_path: Path, monkeypatch: Any, key: str) -> None:
    monkeypatch.setenv("TOKEN", key)
    studio = LabelStudio()
    with serving(studio) as server:
        _oracle(server, tmp_path).rehearse()
    assert not studio.projects and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("project", "export", "message"),
    [
        ({"detail": "x"}, [], "expected 'id' in an object: is it Label Studio 1.x"),
        ({"id": 7}, {"id": 1}, "the export is no list of tasks"),
        ({"id": 7}, [{"id": 1}], "the export is no list of tasks"),
        ({"id": 7}, [], "expected 'task_count' in an object.*Enterprise"),
    ],
)
def test_other_servers_are_refused_in_one_line(
    tmp_path: Path, project: Any, export: Any, message: str
) -> None:
    def answer(request: Request) -> Reply:
        if request.path == "/api/projects/":
            return Reply(project, 201)
        return Reply(export) if request.method == "GET" else Reply({"import": 3}, 201)

    with serving(answer) as server:
        with pytest.raises(ActiveDPOError, match=message) as caught:
            _oracle(server, tmp_path).label(_selection())
    assert "\n" not in str(caught.value)


def test_another_project_with_the_same_number_is_left_alone(tmp_path: Path) -> None:
    """At another address, or after the server was set up again."""
    for folder in ("own", "other"):
        studio = LabelStudio()
        with serving(studio) as server:
            with pytest.raises(LabelsPending):
                _oracle(server, tmp_path / folder).label(_selection())
            if folder == "other":
                with pytest.raises(ActiveDPOError, match="project 7 is another one than .*own"):
                    _oracle(server, tmp_path / "own").label(_selection("q", 2))
                assert len(studio.tasks[7]) == 3
                studio.projects[7]["description"] = None
                with pytest.raises(ActiveDPOError, match="expected 'description'"):
                    _oracle(server, tmp_path / "own").label(_selection("q", 2))


def test_a_project_that_is_gone_is_named(tmp_path: Path) -> None:
    studio = LabelStudio()
    with serving(studio) as server:
        with pytest.raises(LabelsPending):
            _oracle(server, tmp_path).label(_selection())
        studio.projects.clear()
        with pytest.raises(ActiveDPOError, match="404: Not found"):
            _oracle(server, tmp_path).label(_selection())
