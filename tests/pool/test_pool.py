"""Reading, checking and writing pools; every error is one line that names the row."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.pool.items import PoolItem
from activedpo_fast.pool.pool import PreferencePool, as_pool
from activedpo_fast.pool.reading import as_prompts, read_prompts

U = [{"role": "user", "content": "Hi"}]
A = [{"role": "assistant", "content": "Hello"}]
B = [{"role": "assistant", "content": "Hey"}]

# -- strategies ----------------------------------------------------------------------------------

_strings = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip())
)
_messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": _strings}),
    min_size=1,
    max_size=2,
)
_extras = st.dictionaries(
    st.sampled_from(["label", "meta", "note"]),
    st.none()
    | st.booleans()
    | st.integers()
    | _strings
    | st.lists(st.floats(allow_nan=False), max_size=2),
    max_size=2,
)


def _items(texts: st.SearchStrategy[Any]) -> st.SearchStrategy[list[PoolItem]]:
    responses = st.lists(texts, min_size=2, max_size=5, unique_by=repr).map(tuple)
    item = st.builds(PoolItem, _strings, texts, responses, _extras)
    return st.lists(item, min_size=1, max_size=6, unique_by=lambda item: item.id)


_pools = (_items(_strings) | _items(_messages)).map(PreferencePool)


# -- what a pool is ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(pool=_pools)
def test_jsonl_round_trip(pool: PreferencePool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("pools") / "pool.jsonl"
    pool.to_jsonl(path)
    again = PreferencePool.load(path)
    assert list(again) == list(pool)
    assert again.fingerprint() == pool.fingerprint()


@settings(max_examples=60, deadline=None)
@given(pool=_pools)
def test_pairs_rows_and_positions(pool: PreferencePool) -> None:
    expected, row = [], 0
    for item in pool:
        expected += [[row + i, row + j] for i, j in combinations(range(len(item.responses)), 2)]
        row += len(item.responses)
    pairs = pool.pairs()
    assert pairs.dtype == torch.int64 and pairs.tolist() == expected
    offsets = pool.response_offsets.tolist()
    assert pool.n_responses == row == offsets[-1] and len(offsets) == len(pool) + 1
    located = [pool.locate(r) for r in range(row)]
    assert located == [(p, i) for p, item in enumerate(pool) for i in range(len(item.responses))]
    assert all(r == offsets[p] + i for r, (p, i) in enumerate(located))
    assert [pool.position(id) for id in pool.ids] == list(range(len(pool)))


@settings(max_examples=40, deadline=None)
@given(pool=_pools, seed=st.integers(0, 10**6))
def test_ids_are_stable_under_permutation(pool: PreferencePool, seed: int) -> None:
    rows = [{"prompt": item.prompt, "responses": list(item.responses)} for item in pool]
    rows = [row for n, row in enumerate(rows) if row not in rows[:n]]
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    ids = PreferencePool.from_rows(rows).ids
    assert PreferencePool.from_rows(rows[n] for n in order).ids == [ids[n] for n in order]
    assert len(set(ids)) == len(rows)


def test_ids_do_not_change_between_versions() -> None:
    """If the hash changed, saved labels would no longer fit their pools."""
    chat = (
        '[[{"content":"Hi","role":"user"}],[[{"content":"Größe","role":"assistant"}],'
        '[{"content":"Hey","role":"assistant"}]]]'
    )
    for text, row in (
        ('["p",["a","b"]]', {"prompt": "p", "responses": ["a", "b"]}),
        (
            chat,
            {
                "prompt": U,
                "chosen": [{"role": "assistant", "content": "Größe"}],
                "rejected": B,
                "id": None,
                "score": 1,
            },
        ),
    ):
        expected = hashlib.sha256(text.encode()).hexdigest()[:16]
        assert PreferencePool.from_rows([row]).ids == [expected]
    numbered = {"id": 7, "prompt": "p", "responses": ["a", "b"]}
    assert PreferencePool.from_rows([numbered]).ids == ["7"]


def test_fingerprint_sees_content_and_order_alone() -> None:
    items = [PoolItem("a", "p", ("x", "y")), PoolItem("b", "q", ("x", "y"))]
    fingerprint = PreferencePool(items).fingerprint()
    assert len(fingerprint) == 64
    others = [
        items[::-1],
        items[:1],
        [items[0], PoolItem("b", "q", ("y", "x"))],
        [items[0], PoolItem("c", "q", ("x", "y"))],
    ]
    assert len({PreferencePool(other).fingerprint() for other in others} | {fingerprint}) == 5
    with_extra = [items[0], PoolItem("b", "q", ("x", "y"), {"note": 1})]
    assert PreferencePool(with_extra).fingerprint() == fingerprint


def test_sequence_and_subset() -> None:
    pool = PreferencePool(PoolItem(str(n), f"p{n}", ("a", "b", "c")[: 2 + n % 2]) for n in range(5))
    assert pool[-1].id == "4"
    assert pool[1:4].ids == ["1", "2", "3"]
    chosen = pool.subset([3, 0])
    assert chosen.ids == ["3", "0"] and chosen.response_offsets.tolist() == [0, 3, 5]
    assert chosen.subset(torch.tensor([1])).ids == ["0"]  # type: ignore[arg-type]
    for positions, message in (
        ([5], "position 5 is outside 0..4"),
        ([-1], "position -1"),
        ([1, 1], "given twice"),
        ([], "cannot be empty"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            pool.subset(positions)
    with pytest.raises(ActiveDPOError, match="no item with id 'x'"):
        pool.position("x")
    with pytest.raises(ActiveDPOError, match="response row 12 is outside 0..11"):
        pool.locate(12)


# -- readers -------------------------------------------------------------------------------------


def test_all_forms_of_a_row() -> None:
    forms: list[dict[str, Any]] = [
        {"responses": ["a", "b"]},
        {"chosen": "a", "rejected": "b"},
        {"response_a": "a", "response_b": "b"},
        # as in a table that has the columns of several forms
        {"responses": None, "chosen": "a", "rejected": "b", "response_a": float("nan")},
    ]
    for form in forms:
        [item] = PreferencePool.from_rows([{"prompt": "p", "score": 3, **form}])
        assert item == PoolItem(item.id, "p", ("a", "b"), {"score": 3})


def test_rows_are_copied() -> None:
    message = {"role": "user", "content": "Hi"}
    pool = PreferencePool.from_rows([{"prompt": [message], "responses": [A, B]}])
    message["content"] = ""
    assert pool[0].prompt == U


@pytest.mark.parametrize("chat", [False, True])
def test_parquet_and_datasets(chat: bool, tmp_path: Path) -> None:
    texts: tuple[Any, Any, Any] = (U, A, B) if chat else ("Hi", "Hello", "Hey")
    # Only one message has a name: tables fill the others with null.
    texts = ([{**U[0], "name": "Ann"}], A, B) if chat else texts
    rows = [
        {"id": str(n), "prompt": texts[0], "responses": list(texts[1:]), "n": n} for n in range(3)
    ]
    expected = list(PreferencePool.from_rows(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pool.parquet")
    assert list(PreferencePool.load(tmp_path / "pool.parquet")) == expected
    dataset = datasets.Dataset.from_list(rows)
    assert list(PreferencePool.from_dataset(dataset)) == expected
    if not chat:
        assert list(PreferencePool.from_dataset(dataset.with_format("numpy"))) == expected
    splits = datasets.DatasetDict(train=dataset, test=dataset)
    for wrong, message in (
        (splits, "several splits \\('train', 'test'\\)"),
        (dataset.to_iterable_dataset(), "streamed"),
        (rows, "expected a datasets.Dataset, got list"),
        (dataset.select([]), "no rows"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            PreferencePool.from_dataset(wrong)  # type: ignore[arg-type]


def test_a_data_set_is_accepted_as_a_pool() -> None:
    rows = [{"prompt": f"p{n}", "chosen": " a", "rejected": " b", "topic": "x"} for n in range(3)]
    pool = PreferencePool.from_rows(rows)
    assert as_pool(pool) is pool

    class Mine(datasets.Dataset):
        pass

    dataset = datasets.Dataset.from_list(rows)
    for table in (
        dataset,
        Mine(dataset.data),
        dataset.with_format("torch"),
        dataset.select([2, 1, 0]).select([2, 1, 0]),
    ):
        assert list(as_pool(table)) == list(pool)
    for wrong, message in (
        (datasets.DatasetDict(train=dataset), "several splits"),
        (dataset.to_iterable_dataset(), "streamed"),
        (dataset.select([]), "the data set has no rows"),
        (dataset.remove_columns("rejected"), "data set, row 1: 'chosen' without 'rejected'"),
        (datasets.Value("string"), "expected a datasets.Dataset, got Value"),
        (rows, "expected a PreferencePool or a datasets.Dataset, got list"),
        ("pool.jsonl", "got str; make one with PreferencePool.from_rows or"),
        (None, "got NoneType"),
        (datasets.Dataset, "got type"),
    ):
        with pytest.raises(ActiveDPOError, match=message) as caught:
            as_pool(wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_prompts_from_a_data_set_are_those_of_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "topic": "x"} for n in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = datasets.Dataset.from_list(rows)
    prompts = read_prompts(tmp_path / "prompts.jsonl")
    assert as_prompts(dataset) == prompts and as_prompts(prompts) is prompts
    for wrong, message in (
        (datasets.DatasetDict(train=dataset), "several splits"),
        (dataset.select([]), "the data set has no rows"),
        (dataset.select([0, 0]), "row 2: the same prompt as data set, row 1"),
        (
            dataset.rename_column("topic", "chosen"),
            "data set, row 1: the column 'chosen': a prompt has no responses yet",
        ),
        (dataset.remove_columns("prompt"), "data set, row 1: no 'prompt'"),
        ("prompts.jsonl", "prompts: expected Prompts, .*, got str"),
        ({"prompt": "p"}, "got dict"),
        (None, "got NoneType"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            as_prompts(wrong)  # type: ignore[arg-type]


def test_datasets_is_imported_only_for_data_sets() -> None:
    code = (
        "import sys\n"
        "from activedpo_fast import ActiveDPOError, PreferencePool\n"
        "from activedpo_fast.pool.pool import as_pool\n"
        "from activedpo_fast.pool.reading import as_prompts\n"
        "as_pool(PreferencePool.from_rows([{'prompt': 'p', 'responses': ['a', 'b']}]))\n"
        "as_prompts([])\n"
        "for wrong in ([], 'pool.jsonl', None):\n"
        "    try:\n"
        "        as_pool(wrong)\n"
        "    except ActiveDPOError:\n"
        "        pass\n"
        "assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jsonl_details(tmp_path: Path) -> None:
    """A byte-order mark, CR LF, blank lines, and U+2028 inside a string are accepted."""
    path = tmp_path / "pool.jsonl"
    rows = [{"prompt": "p\u2028q", "responses": ["a", "b"]}, {"prompt": "p", "responses": "ab"}]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n")
    assert PreferencePool.load(path)[0].prompt == "p\u2028q"
    path.write_bytes(lines[0] + b"\n\n" + lines[1])
    with pytest.raises(ActiveDPOError, match="pool.jsonl, line 3: 'responses' must be a list"):
        PreferencePool.load(path)


def test_to_jsonl_writes_the_whole_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    PreferencePool([PoolItem("a", "p", ("x", "y"))]).to_jsonl(path)
    before = path.read_bytes()
    bad = PreferencePool([PoolItem("b", "p", ("x", "y"), {"blob": b"1"})])
    with pytest.raises(ActiveDPOError, match="item 'b': the column 'blob' is no JSON value"):
        bad.to_jsonl(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["pool.jsonl"]


# -- bad input -----------------------------------------------------------------------------------

_OK = {"prompt": "p", "responses": ["a", "b"]}
_BAD_ROWS: list[tuple[Any, str]] = [
    ({"responses": ["a", "b"]}, "missing column 'prompt'"),
    ({"prompt": None, "responses": ["a", "b"]}, "missing column 'prompt'"),
    ({"chosen": U + A, "rejected": U + B}, "no 'prompt': .* extract it first"),
    (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No",
        },
        "missing column 'prompt': the texts are whole transcripts; split each .*trl.extract_prompt",
    ),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "No"}, "missing column 'prompt'$"),
    ({"prompt": "p"}, "no responses: expected the column 'responses', or 'chosen' and"),
    ({"prompt": "p", "chosen": None, "rejected": None}, "no responses: expected"),
    ({"prompt": "p", "chosen": "a"}, "'chosen' without 'rejected'"),
    ({"prompt": "p", "response_b": "a", "response_a": None}, "'response_b' without 'response_a'"),
    ({**_OK, "chosen": "a", "rejected": "b"}, "'responses', 'chosen', 'rejected' together do not"),
    ({"prompt": "p", "chosen": "a", "response_b": "b"}, "'chosen', 'response_b' together do not"),
    ({"prompt": "p", "responses": ["a", " \n"]}, "response 2 is empty"),
    ({"prompt": "p", "responses": ["", "b"]}, "response 1 is empty"),
    ({"prompt": "\t", "responses": ["a", "b"]}, "the prompt is empty"),
    ({"prompt": [], "responses": [A, B]}, "the prompt is empty"),
    ({"prompt": U, "responses": [A, []]}, "response 2 is empty"),
    ({"prompt": U, "responses": [A, [{"role": "assistant", "content": " "}]]}, "response 2 is emp"),
    ({"prompt": "p", "responses": ["a"]}, r"1 response\(s\), two or more"),
    ({"prompt": "p", "responses": []}, r"0 response\(s\), two or more"),
    ({"prompt": "p", "responses": ["a", "b", "a"]}, "responses 1 and 3 are identical"),
    ({"prompt": U, "chosen": A, "rejected": [dict(A[0])]}, "responses 1 and 2 are identical"),
    ({"prompt": "p", "responses": "ab"}, "'responses' must be a list of two or more, got str 'ab'"),
    ({"prompt": "p", "responses": ["a", None]}, "response 2 must be text or .* got NoneType"),
    ({"prompt": 5, "responses": ["a", "b"]}, "the prompt must be text or a list .* got int 5"),
    ({"prompt": "p", "responses": ["a", 1.5]}, "response 2 must be text or a list .* got float"),
    ({"prompt": "p\ud800", "responses": ["a", "b"]}, "the prompt has half of a surrogate pair"),
    ({**_OK, "id": 1.5}, "'id' must be a string or an integer, got float 1.5"),
    ({**_OK, "id": True}, "'id' must be a string or an integer, got bool True"),
    ({**_OK, "id": " "}, "'id' is empty"),
    ({"prompt": U, "responses": ["a", "b"]}, "the prompt is chat messages but response 1 is plain"),
    ({"prompt": "p", "responses": ["a", B]}, "the prompt is plain text but response 2 is chat"),
    ({"prompt": U, "responses": [A, B[0]]}, "response 2 must be text or a list of chat messages"),
    ({"prompt": ["p"], "responses": [A, B]}, "the prompt has a chat message that is not an object"),
    ({"prompt": [{"role": "user"}], "responses": [A, B]}, "a chat message without 'content'"),
    ({"prompt": [{"content": "x"}], "responses": [A, B]}, "a chat message without 'role'"),
    ({"prompt": [{"role": "", "content": "x"}], "responses": [A, B]}, "whose 'role' is empty"),
    (
        {"prompt": [{"role": "user", "content": [{"type": "text"}]}], "responses": [A, B]},
        "a part of type 'text' whose 'text' is no string",
    ),
    (["p", "a", "b"], "expected an object with named columns, got list"),
    ("p", "expected an object with named columns, got str 'p'"),
    ({"prompt": "p", "responses": ["c", "b"], "id": "first"}, "id 'first' is already that of"),
    ({"prompt": "first", "responses": ["c", "b"]}, "the same row as"),
    ({"prompt": U, "responses": [A, B]}, "chat messages, but .* has plain text"),
]


@pytest.mark.parametrize(("bad", "message"), _BAD_ROWS)
def test_bad_rows_are_named(bad: Any, message: str, tmp_path: Path) -> None:
    rows = [{**_OK, "id": "first"}, {"prompt": "first", "responses": ["c", "b"]}, bad]
    with pytest.raises(ActiveDPOError, match=f"^row 3: .*{message}") as caught:
        PreferencePool.from_rows(rows)
    assert "\n" not in str(caught.value)
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ActiveDPOError, match=f"pool.jsonl, line 3: .*{message}"):
        PreferencePool.from_jsonl(path)


def test_duplicates_name_both_rows() -> None:
    rows = [_OK, {**_OK, "prompt": "q"}, dict(_OK)]
    with pytest.raises(ActiveDPOError, match="^row 3: the same row as row 1: remove one of them$"):
        PreferencePool.from_rows(rows)
    rows = [{**_OK, "id": 1}, {**_OK, "prompt": "q", "id": "1"}]
    with pytest.raises(ActiveDPOError, match="^row 2: id '1' is already that of row 1: rows need"):
        PreferencePool.from_rows(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "pool.jsonl: no rows$"),
        (b"\n \n", "pool.jsonl: no rows$"),
        (b'%s\n{"prompt": "p",\n', "line 2: broken JSON: .* at column"),
        (b"%s\n[1]\n", "line 2: expected an object"),
        (b'%s\n{"prompt": "\xff"}', r"line 2: not UTF-8 \(byte 13\)"),
        (b"%s\n" + b"[" * 200_000, "line 2: broken JSON"),
        ("p".encode("utf-16"), "line 1: not UTF-8"),
    ],
)
def test_broken_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(content.replace(b"%s", json.dumps(_OK).encode()))
    with pytest.raises(ActiveDPOError, match=message) as caught:
        PreferencePool.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "not.parquet").write_text("no")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "pool.csv").write_text("prompt,chosen,rejected")
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "empty.parquet"
    )
    table = pyarrow.table(
        {"prompt": ["p", "q"], "response_a": ["a", "a"], "response_b": ["b", None]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "null.parquet")
    for name, message in (
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("missing.parquet", "missing.parquet: no such file"),
        ("folder.jsonl", "folder.jsonl: a folder without .jsonl or .parquet"),
        ("not.parquet", "not.parquet: not a Parquet file"),
        ("empty.parquet", "empty.parquet: no rows"),
        ("null.parquet", "row 2: 'response_a' without 'response_b'"),
        ("pool", "pool: no such file or folder"),
        ("pool.csv", "pool.csv: unsupported suffix '.csv', expected .jsonl or"),
    ):
        with pytest.raises(ActiveDPOError, match=message) as caught:
            PreferencePool.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_items_are_checked_as_rows_are() -> None:
    good = PoolItem("a", "p", ("x", "y"))
    for bad, message in (
        (PoolItem("b", "p", ["x", "y"]), "item 2: the responses must be a tuple"),  # type: ignore
        (PoolItem(3, "p", ("x", "y")), "item 2: 'id' must be a string"),  # type: ignore
        (PoolItem("b", "p", ("x", "x")), "item 2: responses 1 and 2 are identical"),
        (PoolItem("a", "q", ("x", "y")), "item 2: id 'a' is already that of item 1"),
        (PoolItem("b", "p", ("x", "y"), {"chosen": 1}), "'chosen' cannot be the name of"),
        ({"prompt": "p"}, "item 2: expected a PoolItem, got dict"),
    ):
        with pytest.raises(ActiveDPOError, match=message):
            PreferencePool([good, bad])  # type: ignore[list-item]
    with pytest.raises(ActiveDPOError, match="the pool has no items"):
        PreferencePool([])


def test_responses_that_begin_with_the_prompt_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    human, model = "\n\nHuman: Hi\n\nAssistant:", [" Hello", " Hey"]
    for prompt, responses, texts in (
        (human, [human + text for text in model], model),
        (U, [[*U, *A], [*U, *B]], [A, B]),
    ):
        whole = [{"id": f"w{n}", "prompt": prompt, "responses": responses} for n in range(2)]
        good = {"id": "g", "prompt": prompt, "responses": texts}
        caplog.clear()
        PreferencePool.from_rows([*whole, good])
        assert len(caplog.records) == 1
        assert (
            caplog.records[0]
            .getMessage()
            .startswith(
                "the responses of 2 of 3 prompts begin with the prompt, which is then read twice"
            )
        )
        caplog.clear()
        PreferencePool.from_rows([whole[0], good])  # one may quote its prompt
        assert not caplog.records
