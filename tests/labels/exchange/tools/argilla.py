"""Argilla's own code reads what we export, and writes the responses of two users.

Run by a Python that has argilla: argilla.py EXPORTED_FOLDER OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path
from uuid import UUID

sys.path.remove(str(Path(__file__).parent))  # this file has the package's name

import argilla as rg  # noqa: E402
import httpx  # noqa: E402
from argilla.records._io import GenericIO, JsonIO  # noqa: E402

ANN, BEN = UUID(int=1), UUID(int=2)
ME = {"id": str(UUID(int=3)), "username": "me", "first_name": "me", "role": "owner"}
# Who answered what, record by record: (user, status, better, strength, comment).
ANSWERS = [
    [(ANN, "submitted", "left", 2, "=1+1"), (BEN, "submitted", "right", None, None)],
    [(ANN, "submitted", "tie", None, None), (BEN, "discarded", "left", None, None)],
    [(ANN, "submitted", "skip", None, None), (BEN, "draft", "left", None, None)],
    [(ANN, "submitted", "right", 3, None)],
]


def main(exported: Path, output: Path) -> None:
    no_server = httpx.MockTransport(lambda request: httpx.Response(200, json=ME))
    client = rg.Argilla(api_url="http://localhost", api_key="none", mounts={"all://": no_server})
    rg.Argilla._set_default(client)
    settings = rg.Settings.from_json(exported / "settings.json")
    settings.validate()
    records = JsonIO._records_from_json(exported / "records.json")
    dataset = rg.Dataset(name="picks", settings=settings, client=client)
    for record, given in zip(records, ANSWERS, strict=True):
        record.dataset = dataset
        for user, status, *values in given:
            for question, value in zip(("better", "strength", "comment"), values, strict=True):
                if value is not None:
                    record.responses.add(rg.Response(question, value, user, status))
        record.api_model().model_dump()  # what would be sent to the server
    flat = GenericIO.to_list(records, flatten=True)
    (output / "argilla.json").write_text(json.dumps(flat, indent=1))
    JsonIO.to_json(records, output / "argilla_nested.json")


main(Path(sys.argv[1]), Path(sys.argv[2]))
