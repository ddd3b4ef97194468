"""Tokens of a run, counted from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from activedpo_fast.report.compute import Tokens, count_tokens, cumulative
from tests.support.models import tiny_tokenizer

PROMPT, RESPONSES = "one two", ["a b c", "d\u2028", "e f"]  # U+2028 ends no line of JSONL


def _count(text: str) -> int:
    return len(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def _write(folder: Path, *labels: object, chat: bool = False) -> None:
    def text(content: str, role: str) -> object:
        return [{"role": role, "content": content}] if chat else content

    prompt = text(PROMPT, "user")
    responses = [text(response, "assistant") for response in RESPONSES]
    for n, label in enumerate(labels):
        round_folder = folder / f"round-00{n}"
        round_folder.mkdir(parents=True)
        pool = {"prompt": prompt, "responses": responses}
        row = {**pool, "responses": responses[:2], "label": label}
        for name, content in (("pool", pool), ("labels", row)):
            line = json.dumps(content, ensure_ascii=False) + "\n"
            (round_folder / f"{name}.jsonl").write_text(line)


CANDIDATES = sum(_count(text) for text in (PROMPT, *RESPONSES))
LABELED = sum(_count(text) for text in (PROMPT, PROMPT, *RESPONSES[:2]))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("requires", "per_token"),
    [
        (set(), 0),
        ({"hidden"}, 1),
        ({"logps", "ref_logps"}, 2),
        ({"gradients", "logps"}, 3),
        ({"gradients", "logps", "ref_logps"}, 4),
    ],
)
def test_compute_is_counted_from_a_runs_files(
    tmp_path: Path, requires: set[str], per_token: int, chat: bool
) -> None:
    _write(tmp_path, 0, 1, chat=chat)
    train = 2 * 4  # epochs; forward, backward (two) and the reference's forward pass
    first = (1 + per_token) * CANDIDATES + train * LABELED
    second = first + (1 + per_token) * CANDIDATES + (per_token + 2 * train) * LABELED
    found = count_tokens(tmp_path, tiny_tokenizer(), frozenset(requires), epochs=2)
    assert cumulative(found) == pytest.approx([0, first / 1000, second / 1000])


def test_only_the_newest_labels_are_trained_on_if_the_run_says_so(tmp_path: Path) -> None:
    _write(tmp_path, 0, 1)
    found = count_tokens(tmp_path, tiny_tokenizer(), frozenset(), epochs=2, train_on="newest")
    assert found[0]["train"] == found[1]["train"] == Tokens(4 * LABELED, 2 * LABELED)


def test_a_fixed_number_of_steps_replaces_the_epochs(tmp_path: Path) -> None:
    _write(tmp_path, 0, 1)
    found = count_tokens(tmp_path, tiny_tokenizer(), frozenset(), epochs=9, pairs_per_round=6)
    # Six pairs of the one there is; then six of the two there are, whose texts are the same.
    assert [stages["train"].backward for stages in found] == [6 * LABELED, 6 * LABELED]


def test_pairs_without_a_preference_are_not_trained_on(tmp_path: Path) -> None:
    _write(tmp_path, "skip", 1)
    found = count_tokens(tmp_path, tiny_tokenizer(), frozenset({"gradients"}), epochs=1)
    assert found[0]["train"] == Tokens(0, 0)
    assert found[1]["train"] == Tokens(2 * LABELED, LABELED)
    assert found[1]["select"] == Tokens(CANDIDATES, CANDIDATES)  # nor do they enter V


def test_rounds_that_are_not_labeled_are_not_counted(tmp_path: Path) -> None:
    _write(tmp_path, 0, 1)
    (tmp_path / "round-001" / "labels.jsonl").unlink()
    assert len(count_tokens(tmp_path, tiny_tokenizer(), frozenset(), epochs=1)) == 1


def test_given_responses_cost_nothing_to_sample(tmp_path: Path) -> None:
    _write(tmp_path, 0)
    requires = frozenset({"gradients"})
    found = count_tokens(tmp_path, tiny_tokenizer(), requires, epochs=1, generated=False)
    assert found[0]["generate"] == Tokens(0, 0)
    assert found[0]["select"] == Tokens(CANDIDATES, CANDIDATES)
