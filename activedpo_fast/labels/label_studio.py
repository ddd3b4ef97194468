"""Labels from people in Label Studio, through its HTTP API.

API: Label Studio 1.x, as api.labelstud.io and label-studio-sdk 2.1 have it. The SDK itself is not
used: it pins packages that an environment for training has in other versions. Label Studio
Enterprise does not serve the export that is read here; it takes files (`activedpo exchange`).
"""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activedpo_fast._files import FilePath, read_json, write_atomic, write_json
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.exchange.label_studio import export
from activedpo_fast.labels.exchange.shown import json_text, pick_key, show_picks, split_record_id
from activedpo_fast.labels.exchange.transfer import import_answers
from activedpo_fast.labels.files import FileOracle, LabelsPending
from activedpo_fast.labels.http import JsonServer, key_from
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.selection.result import Selection

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_RECORD_ID = "activedpo_id"  # of a task's data
_EXPORT_MIB = 512
_LONGEST_TITLE = 50  # characters that Label Studio takes


class LabelStudioOracle:
    """Post a selection to a Label Studio project, and read the answers when they are there.

    `label` makes a project with the labeling interface, once, and posts each pair to it, once. Then
    it raises `LabelsPending` until every pair has an answer; call it with the same selection again
    (rerun the loop). Several answers to a pair become one label by majority. Answers that cannot be
    used are set aside in a file.

    The files are those of `FileOracle`: the picks, and the labels once all are there. The folder
    also has the project's number and mark, and the answers as they came.

    Args:
        folder: where the files are.
        base_url: Label Studio's address, such as `http://localhost:8080`.
        api_key_env: the environment variable that has the access token: a personal access token
            or a legacy one.
        title: of the project.
        timeout: seconds for one request.
        retries: how often a request that changes nothing is sent again after a failure.

    Raises:
        LabelsPending: from `label`, while an answer is missing.
        ActiveDPOError: bad options, or the environment variable is not set. From `label`: Label
            Studio cannot be reached, refuses the token, or answers in another form.

    Examples:
        >>> from activedpo_fast.labels import LabelsPending, LabelStudioOracle
        >>> oracle = LabelStudioOracle(
        ...     "labeling", base_url=label_studio_url, api_key_env="LABEL_STUDIO_TOKEN")
        >>> try:
        ...     labels = oracle.label(picked)
        ... except LabelsPending as pending:
        ...     print(str(pending).split(":")[0])
        4 of 4 pairs have no answer yet
    """

    def __init__(
        self,
        folder: FilePath,
        *,
        base_url: str,
        api_key_env: str,
        title: str = "activedpo",
        timeout: float = 120.0,
        retries: int = 5,
    ) -> None:
        self._folder = Path(folder)
        self._files = FileOracle(folder)
        self._key = key_from(api_key_env)
        self._title = title[:_LONGEST_TITLE]
        self._options: dict[str, Any] = {
            "base_url": base_url,
            "name": "Label Studio",
            "timeout": timeout,
            "retries": retries,
            "max_mib": _EXPORT_MIB,
        }
        JsonServer(**self._options)  # checks the address

    def label(
        self, selection: Selection, pool: PreferencePool | datasets.Dataset | None = None
    ) -> list[int | None]:
        try:
            return self._files.label(selection, pool)
        except LabelsPending:
            pass  # the picks are written
        server = self._connect()
        project = self._project(server)
        tasks = self._posted(server, project, selection)
        waiting = len(selection) - len({_key_of(task) for task in tasks if task.get("annotations")})
        where = f"{server.base_url}/projects/{project}"
        if waiting:
            raise LabelsPending(
                f"{waiting} of {len(selection)} pairs have no answer yet: label them at {where}, "
                "then run again"
            )
        set_aside = self._import(tasks, selection)
        try:
            return self._files.label(selection, pool)
        except LabelsPending:
            raise LabelsPending(
                f"some of {len(selection)} pairs have no answer that can be used, see {set_aside}: "
                f"label them again at {where}, then run again"
            ) from None

    def rehearse(self) -> None:
        """Ask for one project, to see whether Label Studio is there and takes the token."""
        self._connect().request("GET", "/api/projects/", params={"page_size": "1"})

    def _connect(self) -> JsonServer:
        """Return the server, with a token that it takes for some minutes at least."""
        hidden: tuple[str, ...] = (self._key,)
        scheme, token = "Token", self._key
        if self._key.count(".") == 2:  # a personal access token is a JWT, which gets others
            server = JsonServer(**self._options, secrets=hidden)
            value = server.request("POST", "/api/token/refresh/", {"refresh": self._key})
            scheme, token = "Bearer", _field(value, "access", str, server)
            hidden = (self._key, token)
        headers = {"Authorization": f"{scheme} {token}"}
        return JsonServer(**self._options, headers=headers, secrets=hidden)

    def _project(self, server: JsonServer) -> int:
        """Return the number of the run's project; make it first if there is none.

        A project has the folder's mark in its description: at another address, another project may
        have the number.
        """
        path = self._folder / "label-studio.json"
        if path.exists():
            own = read_json(path)
            project, mark = int(_field(own, "project", int, path)), _field(own, "mark", str, path)
            value = server.request("GET", f"/api/projects/{project}/")
            if mark not in str(_field(value, "description", str, server)):
                raise ActiveDPOError(
                    f"Label Studio {server.base_url}: project {project} is another one than that "
                    f"of {self._folder}: give the address that it was made at, or put {mark} back "
                    "into its description"
                )
            return project
        mark = f"activedpo-{secrets.token_hex(8)}"
        body = {
            "title": self._title,
            "description": f"Pairs to compare. A run finds them by this mark: {mark}",
            "label_config": export([])["config.xml"],
        }
        value = server.request("POST", "/api/projects/", body, again=False)
        project = int(_field(value, "id", int, server))
        write_json(path, {"project": project, "mark": mark})
        logger.info("Label Studio: the project is %s/projects/%d", server.base_url, project)
        return project

    def _posted(
        self, server: JsonServer, project: int, selection: Selection
    ) -> list[dict[str, Any]]:
        """Post the pairs that the project lacks, and return the tasks that it has of all."""
        value = server.request(
            "GET",
            f"/api/projects/{project}/export",
            params={"exportType": "JSON", "download_all_tasks": "true"},
        )
        if not isinstance(value, list) or not all(
            isinstance(task, dict) and isinstance(task.get("data"), dict) for task in value
        ):
            raise ActiveDPOError(f"Label Studio {server.base_url}: the export is no list of tasks")
        keys = {pick_key(pick) for pick in selection}
        tasks = [task for task in value if _key_of(task) in keys]
        there = {_key_of(task) for task in tasks}
        shown = show_picks([(f"pick {pick.rank}", pick) for pick in selection], 0)
        new = [pick for pick in shown if pick_key(pick.pick) not in there]
        if new:
            body = json.loads(export(new)["tasks.json"])
            path = f"/api/projects/{project}/import"
            value = server.request("POST", path, body, again=False)
            if _field(value, "task_count", int, server) != len(new):
                raise ActiveDPOError(
                    f"Label Studio {server.base_url}: it took {value['task_count']} of {len(new)} "
                    "tasks"
                )
        return tasks

    def _import(self, tasks: list[dict[str, Any]], selection: Selection) -> Path:
        """Write the labels file, and return the file of answers set aside."""
        to_label, labels = self._files.paths(selection)
        name = to_label.stem.removeprefix("to_label-")
        answers = self._folder / f"label-studio-{name}.json"
        set_aside = self._folder / f"set-aside-{name}.jsonl"
        write_atomic(answers, json_text(tasks, indent=1))
        found = import_answers(
            to_label, answers, "label-studio", labels, set_aside=set_aside, combine="majority"
        )
        if found.set_aside:
            logger.warning("%s: %d answers are set aside", set_aside, found.set_aside)
        return set_aside


def _key_of(task: dict[str, Any]) -> str | None:
    """Return the key of the pick that a task shows; None for a task of somebody else."""
    parts = split_record_id(str(task["data"].get(_RECORD_ID)))
    return None if parts is None else parts[0]


def _field(value: Any, name: str, kind: type, source: JsonServer | Path) -> Any:
    if not isinstance(value, dict) or type(value.get(name)) is not kind:
        place = source if isinstance(source, Path) else f"Label Studio {source.base_url}"
        raise ActiveDPOError(
            f"{place}: expected {name!r} in an object: is it Label Studio 1.x? Enterprise takes "
            "files, see `activedpo exchange`"
        )
    return value[name]
