"""Responses from the caller's own function and from a server, in rounds of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from activedpo_fast import ActiveDPOError, ActiveDPOLoop, PreferencePool, Prompt
from activedpo_fast.labels import CallableOracle
from activedpo_fast.models.adapters import adapter_state
from activedpo_fast.training.generators import generated_responses
from activedpo_fast.training.run_folder import read_adapter
from activedpo_fast.training.server import ServerGeneration
from activedpo_fast.training.trl import dpo_config
from tests.support.generation_server import BASE, GenerationServer
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer
from tests.support.servers import Reply, Request, serving

pytest.importorskip("trl")

PROMPTS = [Prompt(f"p{n}", f"The fox {n}") for n in range(4)]
CHAT = [Prompt(p.id, [{"role": "user", "content": str(p.prompt)}]) for p in PROMPTS]
SAMPLING = {
    "num_generations": 3,
    "max_completion_length": 6,
    "temperature": 1.0,
    "top_p": 0.9,
    "max_attempts": 3,
}


def _model() -> Any:
    return lora(tiny_causal_lm("llama"), "llama")


def _loop(folder: Path, generate: Any) -> ActiveDPOLoop:
    return ActiveDPOLoop(
        _model(),
        tiny_tokenizer(),
        PROMPTS,
        CallableOracle(lambda prompt, a, b: int(str(b) < str(a))),
        output_dir=folder,
        dpo_args=dpo_config(output_dir=str(folder / "trainer"), learning_rate=0.1, max_steps=2),
        strategy="random",
        batch_size=2,
        rounds=2,
        num_generations=2,
        max_completion_length=6,
        generate=generate,
        show_progress=False,
    )


def _pool(folder: Path, t: int) -> PreferencePool:
    return PreferencePool.from_jsonl(folder / f"round-{t:03d}" / "pool.jsonl")


def _responses(
    generate: Any, prompts: Any = PROMPTS, adapter: Path = Path("adapter")
) -> PreferencePool:
    return generated_responses(
        generate,
        _model(),
        tiny_tokenizer(),
        prompts,
        adapter=adapter,
        seed=7,
        sampling=SAMPLING,
        common_template_kwargs={"enable_thinking": False},
    )


# -- a function ------------------------------------------------------------------------------------


def test_a_loop_with_a_function_gives_it_the_policy_of_the_round(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def generate(prompts: Any, num_generations: int, seed: int, **kwargs: Any) -> list[list[str]]:
        calls.append({"prompts": prompts, "n": num_generations, "seed": seed, **kwargs})
        torch.rand(1)
        saved = read_adapter(kwargs["adapter"].parent)
        now = adapter_state(kwargs["model"])
        assert all(torch.equal(saved[name], now[name]) for name in now)
        return [
            [f" {prompt[-1]} {seed % 97} {n}" for n in range(num_generations)] for prompt in prompts
        ]

    _loop(tmp_path / "run", generate).run()
    assert [call["adapter"].parent.name for call in calls] == ["start", "round-000"]
    assert sorted(calls[0]["prompts"]) == sorted(p.prompt for p in PROMPTS)
    assert calls[0]["n"] == 2 and calls[0]["seed"] != calls[1]["seed"]
    assert (calls[0]["max_completion_length"], calls[0]["temperature"]) == (6, 1.0)
    for t in range(2):
        for item in _pool(tmp_path / "run", t):
            marks = f" {item.prompt[-1]} {calls[t]['seed'] % 97}"
            assert item.responses == (f"{marks} 0", f"{marks} 1")
    # Complete, and the same with the seeds of a run that is resumed.
    count = len(calls)
    _loop(tmp_path / "run", generate).run()
    assert len(calls) == count
    with pytest.raises(ActiveDPOError, match="generate .*differs"):
        _loop(tmp_path / "run", None).run()


def test_responses_that_are_missing_are_asked_for_again() -> None:
    calls: list[tuple[list[str], int, int]] = []

    def generate(prompts: Any, num_generations: int, seed: int, **kwargs: Any) -> Any:
        calls.append((list(prompts), num_generations, seed))
        assert kwargs["chat_template_kwargs"] == [{}] * len(prompts)
        if len(calls) == 1:
            return [[" a", " a ", ""], [" a", " b", " c"], [], [" a", " b"]]
        return [[f" {seed % 1000} {n}" for n in range(num_generations)] for _ in prompts]

    state = torch.get_rng_state()
    pool = _responses(generate)
    assert torch.equal(state, torch.get_rng_state())
    assert [call[:2] for call in calls[1:]] == [
        (["The fox 2"], 3),
        (["The fox 0"], 2),
        (["The fox 3"], 1),
    ]
    assert len({seed for *_, seed in calls}) == 4
    assert [len(item.responses) for item in pool] == [3] * 4
    assert pool[1].responses == (" a", " b", " c")
    assert pool[0].responses[0] == " a" and pool[3].responses[:2] == (" a", " b")


def test_chat_prompts_come_with_their_template_s_arguments() -> None:
    own = Prompt("own", CHAT[0].prompt, {"chat_template_kwargs": {"depth": 2}})

    def generate(prompts: Any, chat_template_kwargs: Any, **kwargs: Any) -> Any:
        assert prompts == [own.prompt, CHAT[1].prompt]
        assert chat_template_kwargs == [
            {"enable_thinking": False, "depth": 2},
            {"enable_thinking": False},
        ]
        return [["one", "two", "three"]] * 2

    pool = _responses(generate, [own, CHAT[1]])
    assert pool[0].responses[1] == [{"role": "assistant", "content": "two"}]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "expected a list of responses for each of 4 prompts, got NoneType"),
        ("abcd", "expected a list of responses for each of 4 prompts, got str of 4"),
        ([["a"]], "expected a list of responses for each of 4 prompts, got list of 1"),
        (["a"] * 4, "expected a list of responses for each prompt, got str for one"),
        ([["a", "b", "c", "d"]] * 4, "4 responses to a prompt, 3 were asked for"),
        ([[1]] * 4, "expected texts as responses, got int"),
        ([["a"]] * 4, "no prompt got 3 distinct responses in 3 attempts"),
    ],
)
def test_what_a_function_must_not_return(found: Any, message: str) -> None:
    with pytest.raises(ActiveDPOError, match=message):
        _responses(lambda **kwargs: found)


def test_what_is_no_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ActiveDPOError, match="generate: expected a function, got str"):
        _loop(tmp_path, "http://localhost")
    pairs = PreferencePool.from_rows([{"prompt": "a", "responses": [" b", " c"]}])
    with pytest.raises(ActiveDPOError, match="generate: with responses 'given' no response"):
        ActiveDPOLoop(
            _model(),
            tiny_tokenizer(),
            pairs,
            CallableOracle(lambda prompt, a, b: 0),
            output_dir=tmp_path,
            responses="given",
            generate=lambda **kwargs: [],
        )


# -- a server --------------------------------------------------------------------------------------


def _server(chat: bool = False, **options: Any) -> GenerationServer:
    return GenerationServer(tiny_causal_lm("llama"), tiny_tokenizer(chat=chat), **options)


def test_a_server_answers_with_the_policy_of_each_round(tmp_path: Path) -> None:
    behind = _server()
    with serving(behind) as server:
        generate = ServerGeneration(BASE, base_url=f"{server.address}/v1", show_progress=False)
        _loop(tmp_path / "run", generate).run()
    folders = [str(tmp_path / "run" / name / "adapter") for name in ("start", "round-000")]
    loads = [r.body for r in server.requests if r.path == "/v1/load_lora_adapter"]
    assert [body["lora_path"] for body in loads] == ["", *folders]
    assert list(behind.adapters.values()) == folders[1:]  # the first was unloaded
    assert behind.answers[0][0] == BASE  # the rehearsal's
    names = [body["lora_name"] for body in loads[1:]]
    # Sampled once more, from the adapters as they are on disk, by servers of their own.
    for t, (name, folder) in enumerate(zip(names, folders, strict=True)):
        bodies = [r.body for r in server.requests if (r.body or {}).get("model") == name]
        texts = _again(_server(), name, folder, "/v1/completions", bodies)
        for item in _pool(tmp_path / "run", t):
            assert set(item.responses) <= texts[json.dumps(item.prompt)]
    assert (bodies[0]["n"], bodies[0]["max_tokens"], bodies[0]["top_k"]) == (2, 6, -1)


def _again(
    server: GenerationServer, name: str, folder: str, path: str, bodies: list[dict[str, Any]]
) -> dict[str, set[str]]:
    """The texts that a fresh server answers with, by the prompt as JSON."""
    load = {"lora_name": name, "lora_path": folder}
    server(Request("POST", "/v1/load_lora_adapter", {}, load))
    texts: dict[str, set[str]] = {}
    for body in bodies:
        server(Request("POST", path, {}, body))
        _, prompt, sampled = server.answers[-1]
        texts.setdefault(json.dumps(prompt), set()).update(sampled)
    return texts


def test_calls_go_to_a_server_as_openai_writes_them() -> None:
    """Their arguments are JSON texts there; tools are refused, not left out."""
    arguments = {"city": "Zürich"}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    as_text = {**call, "function": {"name": "f", "arguments": '{"city": "Zürich"}'}}
    messages = [
        *CHAT[0].prompt,
        {"role": "assistant", "tool_calls": [call, as_text]},
        {"role": "tool", "content": "rain", "tool_call_id": "c"},
    ]
    with serving(_server(chat=True)) as server:
        generate = ServerGeneration(
            BASE, base_url=f"{server.address}/v1", load_adapter=False, show_progress=False
        )
        generate.rehearse([messages], [{}])
        with pytest.raises(ActiveDPOError, match="tools cannot be sent to a generation server"):
            generate.rehearse([messages], [{"tools": [{"name": "f"}]}])
    [body] = [r.body for r in server.requests if r.path == "/v1/chat/completions"]
    assert body["messages"] == [
        messages[0],
        {"role": "assistant", "tool_calls": [as_text, as_text]},
        messages[-1],
    ]
    assert call["function"]["arguments"] is arguments


def test_chat_messages_go_to_a_server_s_chat_completions(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    _model().save_pretrained(str(adapter))
    own = Prompt("own", CHAT[0].prompt, {"chat_template_kwargs": {"depth": 2}})
    with serving(_server(chat=True)) as server:
        generate = ServerGeneration(BASE, base_url=f"{server.address}/v1", show_progress=False)
        pool = _responses(generate, [own, CHAT[1]], adapter=adapter)
    asked = [r.body for r in server.requests if r.path == "/v1/chat/completions"]
    arguments = {json.dumps(body["messages"]): body["chat_template_kwargs"] for body in asked}
    assert arguments == {
        json.dumps(own.prompt): {"enable_thinking": False, "depth": 2},
        json.dumps(CHAT[1].prompt): {"enable_thinking": False},
    }
    (name,) = {body["model"] for body in asked}
    texts = _again(_server(chat=True), name, str(adapter), "/v1/chat/completions", asked)
    for item in pool:
        possible = {text.strip() for text in texts[json.dumps(item.prompt)]}
        assert {response[0]["content"] for response in item.responses} <= possible


def test_a_server_that_cannot_load_adapters(tmp_path: Path, caplog: Any) -> None:
    behind = _server(runtime_adapters=False)
    with serving(behind) as server:
        address = {"base_url": f"{server.address}/v1", "show_progress": False}
        with pytest.raises(ActiveDPOError, match="generation: .*does not load adapters while it"):
            _loop(tmp_path / "run", ServerGeneration(BASE, **address)).run()
        with pytest.raises(ActiveDPOError, match="it does not serve 'other', but base"):
            _loop(tmp_path / "run", ServerGeneration("other", **address)).run()
        assert not (tmp_path / "run").exists()
        generate = ServerGeneration(BASE, load_adapter=False, **address)
        generate.rehearse(["The fox"], [{}])
        for _ in range(2):
            assert len(_responses(generate)) == len(PROMPTS)
    assert caplog.text.count("responses of base as it is there, not of the current policy") == 1
    assert {model for model, *_ in behind.answers} == {BASE}
    assert "top_k" not in server.requests[-1].body


def test_answers_that_are_not_the_policy_s_are_refused(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    _model().save_pretrained(str(adapter))
    answers: dict[str, Any] = {}

    def answer(request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply({"data": [{"id": BASE}]})
        if request.path == "/v1/load_lora_adapter":
            return answers.get("load") or Reply(b"Success")
        return Reply({"model": answers.get("model", request.body["model"]), **answers["body"]})

    with serving(answer) as server:
        generate = ServerGeneration(
            BASE, base_url=f"{server.address}/v1", retries=0, show_progress=False
        )

        def refused(prompt: Any = "x", **given: Any) -> str:
            answers.clear()
            answers.update(given)
            with pytest.raises(ActiveDPOError) as caught:
                generate(
                    prompts=[prompt],
                    num_generations=2,
                    seed=0,
                    adapter=adapter,
                    max_completion_length=4,
                    temperature=1.0,
                    top_p=1.0,
                    chat_template_kwargs=[given.get("kwargs", {})],
                )
            assert "\n" not in str(caught.value)
            return str(caught.value)

        text = {"choices": [{"index": 0, "text": " a"}]}
        assert "answered with the model 'base', asked for was 'activedpo-" in refused(
            model=BASE, body=text
        )
        failed = Reply({"error": {"message": "rank 64 is above 16"}}, 500)
        message = refused(load=failed, body=text)
        assert "rank 64 is above 16" in message and str(adapter) in message
        assert "no choices with a text or a message each" in refused(body={"object": "error"})
        chat = [{"role": "user", "content": "x"}]
        parsed = {"content": "a", "reasoning_content": "because"}
        assert "takes reasoning_content out of the responses" in refused(
            chat, body={"choices": [{"message": parsed}]}
        )
        assert "tools cannot be sent" in refused(chat, body=text, kwargs={"tools": []})
