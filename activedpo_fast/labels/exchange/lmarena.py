"""LMArena: rows of battles (model_a, model_b, winner) out and back.

Format: the data sets lmarena-ai/arena-human-preference-140k (`id`, `winner` among model_a, model_b,
tie and both_bad, conversations whose messages hold a list of parts) and
lmsys/chatbot_arena_conversations (`question_id`, `judge`, `winner` with "tie (bothbad)", messages
whose content is a text), by their data cards. Rows go out as those of the former; both come back.
Model A is on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from activedpo_fast.labels.exchange.answers import Answer, Found, Problem, as_labeler
from activedpo_fast.labels.exchange.reading import read_rows
from activedpo_fast.labels.exchange.shown import ShownPick, as_shown, json_text
from activedpo_fast.pool.messages import Message, message_text
from activedpo_fast.pool.texts import Text

_WINNERS = {"model_a": "left", "model_b": "right", "tie": "tie"}
_BOTH_BAD = ("both_bad", "tie (bothbad)")
_PROMPT_MESSAGES = "prompt_messages"  # how many messages are the prompt; 0 for plain text


def export(picks: Sequence[ShownPick]) -> dict[str, str]:
    """Return the JSONL file of the rows, whose `winner` is null."""
    return {"": "".join(json_text(_row(pick)) for pick in picks)}


def answers(path: Path, labeler: str) -> Found:
    """Yield the answers of the rows that have a winner."""
    for place, row in read_rows(path):
        winner = row.get("winner")
        if winner is None or winner == "":
            continue
        yield _answer(row, winner, place, labeler)


def _row(pick: ShownPick) -> dict[str, Any]:
    prompt, responses = pick.pick.prompt, pick.pick.responses
    return {
        "id": pick.record_id,
        "model_a": f"response {pick.order[0]}",
        "model_b": f"response {pick.order[1]}",
        "winner": None,
        "conversation_a": _conversation(prompt, responses[pick.order[0]]),
        "conversation_b": _conversation(prompt, responses[pick.order[1]]),
        _PROMPT_MESSAGES: 0 if isinstance(prompt, str) else len(prompt),
        **pick.identity(),
    }


def _conversation(prompt: Text, response: Text) -> list[dict[str, Any]]:
    messages = [*_messages(prompt, "user"), *_messages(response, "assistant")]
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": message_text(message), "image": None, "mimeType": None}
            ],
        }
        for message in messages
    ]


def _messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _answer(row: Mapping[str, Any], winner: Any, place: str, labeler: str) -> Answer | Problem:
    both_bad = winner in _BOTH_BAD
    choice = "tie" if both_bad else _WINNERS.get(winner) if isinstance(winner, str) else None
    if choice is None:
        known = ", ".join((*_WINNERS, *_BOTH_BAD))
        return Problem(place, f"'winner' is not one of {known}", dict(row))
    prompt: str | None = None
    sides: list[str | None] = [None, None]
    if _PROMPT_MESSAGES in row:
        split = [_split(row.get(f"conversation_{side}"), row[_PROMPT_MESSAGES]) for side in "ab"]
        if split[0] is None or split[1] is None or split[0][0] != split[1][0]:
            return Problem(place, "a conversation was changed", dict(row))
        prompt, sides = split[0][0], [split[0][1], split[1][1]]
    return Answer(
        place=place,
        record_id=str(row.get("id", row.get("question_id"))),
        choice=choice,
        labeler=as_labeler(row.get("judge"), labeler),
        record=dict(row),
        prompt=prompt,
        left=sides[0],
        right=sides[1],
        identity=row,
        comment="both bad" if both_bad else None,
    )


def _split(conversation: Any, prompt_messages: Any) -> tuple[str, str] | None:
    """Return prompt and response of a conversation as shown; None if it has not their form."""
    if not isinstance(conversation, list) or type(prompt_messages) is not int:
        return None
    messages = [_message(message) for message in conversation]
    found = [message for message in messages if message is not None]
    if len(found) < len(messages) or prompt_messages < 0:
        return None
    if prompt_messages:
        return as_shown(found[:prompt_messages]), as_shown(found[prompt_messages:])
    return (found[0]["content"], found[1]["content"]) if len(found) == 2 else None


def _message(message: Any) -> Message | None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return None
    content = message.get("content")
    if isinstance(content, list):  # parts, of which only texts are known here
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = texts[0] if len(texts) == 1 else None
    return {"role": message["role"], "content": content} if isinstance(content, str) else None
