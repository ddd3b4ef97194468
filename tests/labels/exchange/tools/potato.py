"""Potato's own server serves the project that we export, and two annotators answer.

Run by a Python that has potato-annotation: potato.py EXPORTED_FOLDER PORT
The answers are posted as the page posts them; they are then in EXPORTED_FOLDER/annotation_output.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.remove(str(Path(__file__).parent))  # this file has the package's name

import requests  # noqa: E402
from potato.validate_cli import validate_config_file  # noqa: E402

# Who answered what, item by item: the fields of the page.
TILE = "better:::selection"
BINARY = {
    "ann": [{TILE: "A", "comment:::text_box": "=1+1"}, {TILE: "tie"}, {"no_answer:::skip": "skip"}],
    "ben": [{TILE: "B"}, {TILE: "A"}],
}
SCALE = {"ann": [{"better:::scale_value": value} for value in ("-2", "0", "3")]}


def main(folder: Path, port: int) -> None:
    config = folder / "config.yaml"
    report = validate_config_file(str(config))
    assert report.ok and not report.unknown_keys, report.to_dict()
    items = [json.loads(line)["id"] for line in open(folder / "picks.jsonl")]
    command = [sys.executable, "-m", "potato", "start", str(config), "-p", str(port)]
    server = subprocess.Popen(command, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address)
        answers = SCALE if "mode: scale" in config.read_text() else BINARY
        for who, given in answers.items():
            annotate(address, who, dict(zip(items, given, strict=False)))
    finally:
        server.terminate()
        server.wait(20)


def wait_for(address: str) -> None:
    for _ in range(120):
        try:
            requests.get(address, timeout=5)
            return
        except requests.ConnectionError:
            time.sleep(0.5)
    raise RuntimeError("the server does not answer")


def annotate(address: str, who: str, answers: dict) -> None:
    session = requests.Session()
    page = session.post(f"{address}/auth", data={"action": "login", "email": who, "pass": ""})
    page.raise_for_status()
    session.get(f"{address}/annotate").raise_for_status()
    for item, values in answers.items():
        body = {"instance_id": item, "annotations": values, "span_annotations": []}
        reply = session.post(f"{address}/updateinstance", json=body)
        assert reply.ok and reply.json()["status"] == "success", reply.text


main(Path(sys.argv[1]), int(sys.argv[2]))
