"""Calls of tools and images where people label, and what labels without people does with them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
pytest.importorskip("starlette")

from PIL import Image  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from activedpo_fast.errors import ActiveDPOError  # noqa: E402
from activedpo_fast.labels.exchange import TOOLS, export_picks, import_answers  # noqa: E402
from activedpo_fast.labels.exchange.shown import as_shown  # noqa: E402
from activedpo_fast.labels.judge.prompt import DEFAULT_TEMPLATE, fill  # noqa: E402
from activedpo_fast.labels.page.app import make_app  # noqa: E402
from activedpo_fast.labels.page.batch import Batch  # noqa: E402
from activedpo_fast.labels.page.session import Session  # noqa: E402
from activedpo_fast.labels.page.texts import differences, messages  # noqa: E402
from activedpo_fast.labels.reading import read_labels  # noqa: E402
from activedpo_fast.labels.reward_model import RewardModel  # noqa: E402
from activedpo_fast.report.labels import text_length  # noqa: E402
from activedpo_fast.selection.picks_jsonl import Pick  # noqa: E402
from activedpo_fast.selection.result import Selection  # noqa: E402
from tests.labels.exchange.answering import fill_in  # noqa: E402
from tests.support.labeling import open_labeling, write_picks  # noqa: E402
from tests.support.models import tiny_tokenizer  # noqa: E402

CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": "<b>", "n": [2, None]}}}
PROMPT = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "2?"}],
    },
    {"role": "assistant", "tool_calls": [{"name": "look", "arguments": '{"x": 1}'}]},
    {"role": "tool", "content": "2", "tool_call_id": "c"},
]
CALLS = [{"role": "assistant", "content": "I *add*.", "tool_calls": [CALL]}]
ANSWERS = [{"role": "assistant", "content": "Two."}]
TOOL_PICK = Pick("t", (0, 1), 1.0, 0, PROMPT, (CALLS, ANSWERS), {"tools": [{"name": "sum"}]})
LINE = '[call] sum({"a": "<b>", "n": [2, null]})'


def _image_pick(folder: Path) -> Pick:
    Image.new("RGB", (3000, 30), "red").save(folder / "red.png")
    data = io.BytesIO()
    Image.new("L", (8, 8)).save(data, format="PNG")
    uri = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    parts = [
        {"type": "image", "image": str(folder / "red.png")},
        {"type": "text", "text": "Which?"},
        {"type": "image", "image": uri},
    ]
    return Pick("i", (0, 1), 0.5, 1, [{"role": "user", "content": parts}], (CALLS, ANSWERS))


# -- the page --------------------------------------------------------------------------------------


def test_the_page_shows_calls_as_code() -> None:
    user, calling, tool = messages(PROMPT)
    assert (user["text"], user["html"]) == ("What is\n2?", "<p>What is<br />\n2?</p>\n")
    assert calling["text"] == '[call] look({"x": 1})'
    assert tool == {"role": "tool", "text": "2", "html": "<p>2</p>\n"}
    [shown] = messages(CALLS)
    assert shown["text"] == f"I *add*.\n{LINE}"
    assert "<em>add</em>" in shown["html"] and "<b>" not in shown["html"]
    assert "<pre><code>[call] sum({&quot;a&quot;: &quot;&lt;b&gt;&quot;" in shown["html"]
    left, right = differences(CALLS, ANSWERS)
    assert "".join(text for text, _ in left) == f"I *add*.\n{LINE}"
    assert all(differs for _, differs in right)


def _client(path: Path) -> TestClient:
    session = Session(open_labeling(path), "ann")
    app = make_app(session, hosts=["127.0.0.1:9"], token="secret", finish=lambda: None)
    return TestClient(
        app, base_url="http://127.0.0.1:9", headers={"Authorization": "Bearer secret"}
    )


def test_the_page_shows_images_of_prompts(tmp_path: Path) -> None:
    path = write_picks(tmp_path / "picked.jsonl", [_image_pick(tmp_path)])
    with _client(path) as client:
        response = client.get("/api/pair")
        [message] = response.json()["pair"]["prompt"]
        assert "img-src 'self' data:;" in response.headers["content-security-policy"]
    assert message["text"] == "Which?"
    sizes = []
    for image in message["images"]:
        kind, _, content = image.partition(",")
        assert kind == "data:image/png;base64"
        sizes.append(Image.open(io.BytesIO(base64.b64decode(content))).size)
    assert sizes == [(1600, 16), (8, 8)]


def test_a_file_that_is_no_image_is_not_shown(tmp_path: Path) -> None:
    pick = _image_pick(tmp_path)
    path = write_picks(tmp_path / "picked.jsonl", [pick])
    (tmp_path / "red.png").write_text("root:x:0:0")
    with _client(path) as client:
        response = client.get("/api/pair")
    assert response.status_code == 500 and "root:x" not in response.text
    assert "cannot be read as an image" in response.json()["error"]
    (tmp_path / "red.png").unlink()
    with pytest.raises(ActiveDPOError, match="line 1: there is no image file"):
        Batch.read(path)


# -- annotation tools ------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", TOOLS)
def test_calls_and_images_go_to_tools_and_labels_come_back(
    tool: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picks = Selection((TOOL_PICK, _image_pick(tmp_path)), "random")
    batch, output = tmp_path / "batch.jsonl", tmp_path / "labels.jsonl"
    picks.to_jsonl(batch)
    exported = tmp_path / f"out{TOOLS[tool].suffix}"
    export_picks(batch, tool, exported, seed=None)
    assert "1 of 2 picks have images" in caplog.text
    files = [exported] if exported.is_file() else list(exported.rglob("*.json*"))
    written = "".join(file.read_text() for file in files).replace('\\"', '"').replace('""', '"')
    assert LINE in written and "[image: " in written and '[call] look({"x": 1})' in written
    import_answers(batch, fill_in(tool, exported, ["left", "right"]), tool, output)
    answered, labels = read_labels(output)
    assert labels == [0, 1] and tuple(answered) == picks.picks


def test_judges_and_reports_see_calls() -> None:
    asked = fill(DEFAULT_TEMPLATE, PROMPT, CALLS, ANSWERS, 10_000)
    assert f"assistant: I *add*.\n{LINE}\n" in asked
    assert text_length(CALLS) == len(f"I *add*.\n{LINE}") > text_length(ANSWERS) == 4
    assert as_shown(PROMPT).startswith("user: What is\n2?\n\nassistant: [call] look(")


# -- picks and reward models -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": 3},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["x"]},
        {"role": "assistant", "tool_calls": [{"arguments": {}}]},
    ],
)
def test_broken_messages_in_a_file_of_picks_are_named(message: Any, tmp_path: Path) -> None:
    path = write_picks(tmp_path / "picked.jsonl", [TOOL_PICK])
    record = json.loads(path.read_text())
    for name, value in (("prompt", [message]), ("responses", [[message], ANSWERS])):
        path.write_text(json.dumps({**record, name: value}))
        with pytest.raises(ActiveDPOError, match=f"line 1: '{name}' must be"):
            Selection.from_jsonl(path)


def test_a_reward_model_gets_calls_and_refuses_images(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=384,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=1,
    )
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls or '' }}{% endfor %}"
    )
    reward = RewardModel(LlamaForSequenceClassification(config), tokenizer, show_progress=False)
    other = [{**CALLS[0], "tool_calls": [{"name": "other"}]}]
    first, second = reward([PROMPT, PROMPT], [CALLS, other], [{}, {}])
    assert first != second
    with pytest.raises(ActiveDPOError, match="a prompt has images, and the reward model"):
        reward([_image_pick(tmp_path).prompt], [CALLS], [{}])
