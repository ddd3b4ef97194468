"""Several rows of one prompt count as one prompt, and the same pair of texts as one pair."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from activedpo_fast import ActiveDPOError, ActiveDPOSelector, PickRules, PreferencePool, Selection
from activedpo_fast.labels.labeled_pairs import read_labeled_pairs
from activedpo_fast.pool.items import Prompt
from activedpo_fast.selection.candidates import candidate_pairs, split_history
from activedpo_fast.selection.picks_jsonl import Pick
from activedpo_fast.selection.prompts import PoolPrompts, distinct_prompts, same_prompt
from activedpo_fast.selection.signals import TensorSignals
from activedpo_fast.selection.strategies import make_strategy
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer


def said(role: str, content: str, swap: bool = False) -> list[dict[str, str]]:
    message = {"role": role, "content": content}
    return [dict(reversed(message.items())) if swap else message]


def comparisons(chat: bool = False) -> PreferencePool:
    """Rows as in comparison data: three of prompt x and two of prompt y. Row 2 is row 0 with its
    responses in the other order."""
    rows = [("x", "a", "b"), ("y", "a", "b"), ("x", "b", "a"), ("x", "b", "c"), ("y", "b", "d")]
    return PreferencePool.from_rows(
        {
            "id": f"row-{n}",
            "prompt": said("user", prompt, n > 1) if chat else prompt,
            "responses": [said("assistant", r, n > 1) if chat else r for r in pair],
            "post": prompt if n < 4 else "z",
        }
        for n, (prompt, *pair) in enumerate(rows)
    )


def test_prompts_and_responses_are_numbered_by_their_texts() -> None:
    for chat in (False, True):
        prompts = PoolPrompts.of(comparisons(chat))
        assert prompts.of_item.tolist() == [0, 1, 0, 0, 1]
        assert prompts.first_row.tolist() == [0, 1, 2, 3, 1, 0, 1, 7, 3, 9]
    prompts = PoolPrompts.of(comparisons(), "post")
    assert prompts.of_item.tolist() == [0, 1, 0, 0, 2]
    assert prompts.first_row.tolist() == [0, 1, 2, 3, 1, 0, 1, 7, 8, 9]


@pytest.mark.parametrize("chat", [False, True])
def test_a_pair_is_a_candidate_once_and_not_again_under_another_id(
    chat: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="activedpo_fast")
    pool, nothing = comparisons(chat), torch.empty(0, 2, dtype=torch.int64)
    assert candidate_pairs(pool, nothing, []).tolist() == [[0, 1], [2, 3], [6, 7], [8, 9]]
    assert [r.getMessage() for r in caplog.records] == [
        "1 of 5 pairs have the prompt and responses of an earlier one: each is a candidate once"
    ]
    for known in ([[0, 1]], [[4, 5]], [[1, 0]]):
        assert candidate_pairs(pool, torch.tensor(known), []).tolist() == [[2, 3], [6, 7], [8, 9]]
    item = pool[2]
    for id, responses in (
        ("row-2", item.responses),
        ("row-0", item.responses[::-1]),
        ("elsewhere", item.responses),
        ("row-1", item.responses),
    ):
        pick = Pick(id, (0, 1), 1.0, 0, item.prompt, responses)
        rows, others = split_history(pool, [pick])
        # The row with its id or, without one, the first; in the order of the pick.
        texts = [pool[pool.locate(r)[0]].responses[pool.locate(r)[1]] for r in rows[0].tolist()]
        assert texts == list(responses) and not others
        assert candidate_pairs(pool, rows, []).tolist() == [[2, 3], [6, 7], [8, 9]]
    assert split_history(pool, [replace(pick, id="row-2")])[0].tolist() == [[4, 5]]
    # Its responses are in the pool, but no row has both.
    a_and_c = (pool[0].responses[0], pool[3].responses[1])
    across = Pick("row-0", (0, 1), 1.0, 0, item.prompt, a_and_c)
    assert split_history(pool, [across])[1] == [across]


def test_a_column_says_what_one_prompt_is() -> None:
    rows = [("x", 1), ("x!", 1), ("x", "1"), ("x", 2), ("w", True)]
    pool = PreferencePool.from_rows(
        {"id": str(n), "prompt": prompt, "responses": ["a", "b"], "post": post}
        for n, (prompt, post) in enumerate(rows)
    )
    prompts = PoolPrompts.of(pool, "post")
    assert prompts.of_item.tolist() == [0, 0, 0, 1, 2]
    nothing = torch.empty(0, 2, dtype=torch.int64)
    assert candidate_pairs(pool, nothing, [], prompts).tolist() == [[0, 1], [6, 7], [8, 9]]
    rules = PickRules(exclude=["1"], prompt_by="post")
    assert rules.excluded(pool) == {"0", "1", "2"}
    with pytest.raises(ActiveDPOError, match="prompt_by: item '0' has no 'thread'"):
        PickRules(max_per_prompt=1, prompt_by="thread").bind(pool, pool.pairs(), 1)
    with pytest.raises(ActiveDPOError, match="prompt_by must be the name of a field, not 3"):
        PickRules(prompt_by=3)  # type: ignore[arg-type]
    bad = PreferencePool.from_rows(
        [{"id": "q", "prompt": "x", "responses": ["a", "b"], "post": [1]}]
    )
    with pytest.raises(ActiveDPOError, match="'post' of item 'q' must be text, an integer or a"):
        PickRules(prompt_by="post").bind(bad, bad.pairs(), 1)


def test_excluding_one_row_excludes_its_prompt() -> None:
    pool = comparisons()
    eligible = PickRules(exclude=["row-3"]).bind(pool, pool.pairs(), 1)
    assert eligible.remaining.tolist() == [False, True, False, False, True]
    assert same_prompt(pool, ["row-1", "no-such"], None) == {"row-1", "row-4"}


def test_repeated_prompts_are_offered_once() -> None:
    prompts = [
        Prompt(f"p{n}", text, {"post": post})
        for n, (text, post) in enumerate([("x", 1), ("y", 1), ("x", 2), ("y", 1)])
    ]
    assert [p.id for p in distinct_prompts(prompts, None)] == ["p0", "p1"]
    assert [p.id for p in distinct_prompts(prompts, "post")] == ["p0", "p1", "p2"]


def test_aplp_takes_the_entropy_of_a_prompt_over_all_its_rows() -> None:
    """Prompt 0 has items 0 and 2, whose second response is one of item 0's: it counts once."""
    logps = torch.tensor([-40, -10, -21, -21, -10, -8], dtype=torch.float64)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    parts = dict(
        pairs=pairs,
        item_of_row=torch.tensor([0, 0, 1, 1, 2, 2]),
        logps=logps,
        ref_logps=torch.zeros(6, dtype=torch.float64),
    )

    def prompts_kept(**more: torch.Tensor) -> list[int]:
        got = make_strategy("aplp", shortlist=1).select(TensorSignals(**parts, **more), 1)
        return got.indices.tolist()

    assert prompts_kept() == [0]  # item by item: 25, 21, 9
    number = torch.tensor([0, 0, 1, 1, 0, 0])
    assert prompts_kept(prompt_of_row=number) == [1]  # 17, 21
    again = torch.tensor([False, False, False, False, True, True])
    assert prompts_kept(prompt_of_row=number, repeated=again) == [0]  # 25, 21
    with pytest.raises(ActiveDPOError, match=r"prompt_of_row must be torch.int64 \[6\]"):
        prompts_kept(prompt_of_row=number[:5])


@pytest.mark.parametrize("strategy", ["activedpo", "random", "aplp", "margin_large"])
def test_the_selector_goes_by_texts(strategy: str) -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    chooser = ActiveDPOSelector(
        model, tiny_tokenizer(), strategy=strategy, proj_dim=64, verify=False
    )
    # Rows 6 and 7 repeat rows 0 and 1.
    pool = PreferencePool.from_rows(
        {"id": f"row-{n}", "prompt": f"Post {n % 3}:", "responses": [f" {n % 6}", f" b{n % 2}"]}
        for n in range(8)
    )
    picked = chooser.select(pool, 6, rules=PickRules(max_per_prompt=1))
    assert sorted(pick.prompt for pick in picked) == ["Post 0:", "Post 1:", "Post 2:"]
    first = chooser.select(pool, 6)
    assert len({(pick.prompt, pick.responses) for pick in first}) == 6
    assert chooser.select(pool, 7) == first  # there are only 6
    renamed = Selection(
        tuple(
            replace(pick, id=f"other-{pick.id}", responses=pick.responses[::-1])
            for pick in first[:2]
        ),
        strategy,
    )
    texts = {frozenset(pick.responses) for pick in renamed}
    for given in ({"labeled": renamed}, {"asked": renamed}):
        later = chooser.select(pool, 4, **given)
        assert not texts & {frozenset(pick.responses) for pick in later}
    assert (
        chooser.select(pool, 4, labeled=renamed).picks
        == chooser.select(pool, 4, labeled=first[:2]).picks
    )


def test_asked_pairs_are_no_candidates_and_not_in_v() -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    chooser = ActiveDPOSelector(model, tiny_tokenizer(), proj_dim=64, verify=False)
    pool = PreferencePool.from_rows(
        {"id": f"r{n}", "prompt": f"Post {n}:", "responses": [f" {n}", f" b{n % 2}", " c"]}
        for n in range(3)
    )
    free = chooser.select(pool, 9)
    left = chooser.select(pool, 1, asked=free[1:])
    assert left[0].id == free[0].id and left[0].score == pytest.approx(free[0].score, rel=1e-6)
    alone = chooser.select(pool, 1, asked=free[:8])
    labeled = chooser.select(pool, 1, labeled=free[:8])
    assert alone[0].pair == labeled[0].pair == free[8].pair
    assert labeled[0].score == pytest.approx(free[8].score, rel=1e-4)
    assert alone[0].score > 1.1 * labeled[0].score  # only the first score is for an empty V


def test_labels_of_a_file_are_found_by_their_texts(tmp_path: Path) -> None:
    pool, path = comparisons(), tmp_path / "labels.jsonl"

    def read(*lines: dict[str, object]) -> list[list[list[int]]]:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [pairs.tolist() for pairs in read_labeled_pairs(path, pool)]

    line = {"id": "old", "pair": [3, 1], "prompt": "x", "responses": ["c", "b"], "label": 0}
    assert read(line) == [[[7, 6]], []]
    assert read({**line, "id": "row-0"}) == [[[7, 6]], []]  # the id of another row of the prompt
    assert read({**line, "id": "row-1"}) == [[[7, 6]], []]
    # Two labels of one pair, under two ids, are two labels.
    assert read(
        {"id": "row-0", "pair": [0, 1], "label": 1}, {"id": "row-2", "pair": [0, 1], "label": 0}
    ) == [[[0, 1], [4, 5]], []]
    # The item's own id, with the responses in the other order, or other numbers than it has now.
    assert read({**line, "id": "row-3", "pair": [0, 1]}) == [[[7, 6]], []]
    assert read({**line, "id": "row-3", "responses": ["b", "c"]}) == [[[6, 7]], []]
    strange = {**line, "responses": ["c", "zz"]}
    for wrong, message in (
        (strange, "no item with id 'old'"),
        ({**strange, "id": "row-3"}, "'pair' is"),
        ({**strange, "id": "row-3", "pair": [0, 1]}, "'responses' is not that of item 'row-3'"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            read(wrong)


def test_labels_of_a_file_are_of_items_with_the_same_template_arguments(tmp_path: Path) -> None:
    pool = PreferencePool.from_rows(
        {
            "id": f"row-{n}",
            "prompt": said("user", "x"),
            "chat_template_kwargs": {"think": bool(n)},
            "responses": [said("assistant", "a"), said("assistant", "b")],
        }
        for n in range(2)
    )
    path = tmp_path / "labels.jsonl"

    def read(**changes: object) -> list[list[int]]:
        path.write_text(
            json.dumps(
                {
                    "id": "old",
                    "pair": [0, 1],
                    "prompt": said("user", "x"),
                    "label": 1,
                    "responses": [said("assistant", "a"), said("assistant", "b")],
                    "item_chat_template_kwargs": {"think": True},
                    **changes,
                }
            )
        )
        known: list[list[int]] = read_labeled_pairs(path, pool)[0].tolist()
        return known

    assert read() == read(id="row-1") == [[2, 3]]
    assert read(item_chat_template_kwargs={"think": False}) == [[0, 1]]
    for changes, message in (({"think": 3}, "no item with id 'old'"), (None, "no item with id")):
        with pytest.raises(ActiveDPOError, match=message):
            read(item_chat_template_kwargs=changes)
    with pytest.raises(ActiveDPOError, match="'item_chat_template_kwargs' is not that of item"):
        read(item_chat_template_kwargs={"think": 3}, id="row-0")
