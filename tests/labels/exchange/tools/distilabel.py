"""distilabel's own task UltraFeedback rates what we export; its judge is a table.

Run by a Python that has distilabel: distilabel.py EXPORTED_FILE OUTPUT_FILE
"""

import json
import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).parent))  # this file has the package's name

from distilabel.models.llms.base import LLM  # noqa: E402
from distilabel.steps.tasks import UltraFeedback  # noqa: E402

# What the judge replies, pair by pair; None: the call failed.
RATED = "Rating: {}\nRationale: {}\n\nRating: {}\nRationale: {}"
REPLIES = [
    RATED.format(5, "to the point", 1, "wrong"),
    RATED.format(3, "fine", 3, "fine"),
    None,
    RATED.format(2, "curt", 4, "friendly"),
]


class Table(LLM):
    """Replies from the table, in order."""

    def load(self) -> None:
        super().load()

    @property
    def model_name(self) -> str:
        return "judge-1"

    def generate(self, inputs, num_generations=1, **kwargs):
        replies = REPLIES[: len(inputs)]
        return [{"generations": [reply], "statistics": {}} for reply in replies]


def main(exported: Path, output: Path) -> None:
    rows = [json.loads(line) for line in open(exported)]
    task = UltraFeedback(llm=Table(), use_default_structured_output=False)
    task.load()
    (rated,) = task.process(rows)
    output.write_text("".join(json.dumps(row) + "\n" for row in rated))


main(Path(sys.argv[1]), Path(sys.argv[2]))
