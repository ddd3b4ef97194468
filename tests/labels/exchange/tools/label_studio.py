"""Label Studio's own code reads what we export, annotates it and exports it in both forms.

Run by a Python that has label-studio-sdk: label_studio.py EXPORTED_FOLDER OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path

from label_studio_sdk.converter import Converter
from label_studio_sdk.label_interface import LabelInterface

# Who answered what, task by task: (annotator, control, value), or a cancelled annotation.
ANSWERS = [
    [(1, "better", "left"), (2, "better", "right")],
    [(1, "no_preference", "tie"), (2, None, None)],
    [(1, "no_preference", "skip"), (2, "better", "left")],
    [(1, "better", "right")],
]


def main(exported: Path, output: Path) -> None:
    config = (exported / "config.xml").read_text()
    interface = LabelInterface(config)
    interface.validate()
    tasks = json.loads((exported / "tasks.json").read_text())
    done = []
    for n, (task, given) in enumerate(zip(tasks, ANSWERS, strict=True), start=1):
        assert interface.validate_task(task, validate_regions_only=False), task
        annotations = [annotation(interface, 10 * n + who, who, *answer) for who, *answer in given]
        done.append({"id": n, **task, "annotations": annotations, "predictions": []})
    (output / "label_studio.json").write_text(json.dumps(done, indent=1))
    converter = Converter(config, project_dir=None, download_resources=False)
    converter.convert_to_json_min(str(output / "label_studio.json"), str(output), is_dir=False)
    (output / "result.json").rename(output / "label_studio_min.json")


def annotation(interface, number, who, control, value):
    result = []
    if control is not None:
        region = interface.get_control(control).label(value)._dict()
        # The SDK makes a pairwise region whose to_name its own check does not know.
        assert control == "better" or interface.validate_region(region)
        result = [region]
        if who == 1:
            comment = interface.get_control("comment").label(text=["=1+1 said \u2028 ann"])._dict()
            assert interface.validate_region(comment)
            result.append(comment)
    return {
        "id": number,
        "completed_by": who,
        "result": result,
        "was_cancelled": control is None,
        "lead_time": 4.25,
        "created_at": f"2026-01-01T00:00:{number:02d}Z",
        "updated_at": f"2026-01-01T00:00:{number:02d}Z",
    }


main(Path(sys.argv[1]), Path(sys.argv[2]))
