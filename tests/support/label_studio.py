"""The part of Label Studio's HTTP API that labels go through, with its data in memory."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.servers import Reply, Request

LEGACY = "0123456789abcdef0123456789abcdef01234567"
PERSONAL = "eyJhbGciOiJIUzI1NiJ9.eyJleHAiOjk5fQ.c2lnbmF0dXJl"


class LabelStudio:
    """Answers requests as Label Studio 1.x does; `annotate` is what its users do."""

    def __init__(self, *, takes: int | None = None) -> None:
        self.projects: dict[int, dict[str, Any]] = {}
        self.tasks: dict[int, list[dict[str, Any]]] = {}
        self.takes = takes  # how many tasks of an import it keeps
        self._issued: list[str] = []
        self._annotations = 0

    def annotate(self, choose: Any, *, labeler: int = 1, cancelled: bool = False) -> None:
        """Answer every task with `choose(data)`: left, right, tie, skip, or None for later."""
        for task in (task for tasks in self.tasks.values() for task in tasks):
            if (choice := choose(task["data"])) is None:
                continue
            control = {"from_name": "better", "to_name": "left,right", "type": "pairwise"}
            result = {**control, "value": {"selected": choice}}
            if choice in ("tie", "skip"):
                control = {"from_name": "no_preference", "to_name": "prompt", "type": "choices"}
                result = {**control, "value": {"choices": [choice]}}
            self._annotations += 1
            task["annotations"].append(
                {
                    "id": self._annotations,
                    "completed_by": labeler,
                    "result": [] if choice == "nothing" else [result],
                    "was_cancelled": cancelled,
                    "lead_time": 2.5,
                }
            )

    def __call__(self, request: Request) -> Reply:
        url = urlsplit(request.path)
        route = (request.method, url.path)
        if route == ("POST", "/api/token/refresh/"):
            if request.body != {"refresh": PERSONAL}:
                return Reply({"detail": "Token is invalid"}, 401)
            self._issued.append(f"access-{len(self._issued)}")
            return Reply({"access": self._issued[-1]})
        allowed = [f"Token {LEGACY}", *(f"Bearer {token}" for token in self._issued[-1:])]
        if request.headers.get("authorization") not in allowed:
            return Reply({"detail": "Invalid token."}, 401)
        if route == ("GET", "/api/projects/"):
            return Reply({"count": len(self.projects), "results": list(self.projects.values())})
        if route == ("POST", "/api/projects/"):
            number = len(self.projects) + 7
            self.projects[number] = {"id": number, **request.body}
            self.tasks[number] = []
            return Reply(self.projects[number], 201)
        parts = url.path.split("/")
        if parts[:3] != ["", "api", "projects"] or int(parts[3]) not in self.projects:
            return Reply({"detail": "Not found."}, 404)
        if route[0] == "GET" and parts[4:] == [""]:
            return Reply(self.projects[int(parts[3])])
        tasks = self.tasks[int(parts[3])]
        if (request.method, parts[4]) == ("POST", "import"):
            for task in request.body[: self.takes]:
                tasks.append({"id": len(tasks) + 1, "annotations": [], "data": task["data"]})
            return Reply({"task_count": len(request.body[: self.takes]), "duration": 0.1}, 201)
        assert (request.method, parts[4]) == ("GET", "export")
        query = parse_qs(url.query)
        assert query["exportType"] == ["JSON"]
        every = query.get("download_all_tasks") == ["true"]
        return Reply([task for task in tasks if every or task["annotations"]])
