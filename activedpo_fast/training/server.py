"""Responses from a server with OpenAI's completions, which loads the adapter of each round.

Adapters are loaded as vLLM does (`/v1/load_lora_adapter`, with VLLM_ALLOW_RUNTIME_LORA_UPDATING).
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from activedpo_fast._checks import check_at_least
from activedpo_fast._files import checksum_of_file
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.http import JsonServer, NotThere, RequestRefused, key_from
from activedpo_fast.labels.judge.asking import ask_all
from activedpo_fast.pool.messages import Message
from activedpo_fast.pool.texts import Text
from activedpo_fast.progress import progress_bar
from activedpo_fast.training.recorded import digest

logger = logging.getLogger(__name__)

_MODELS, _LOAD, _UNLOAD = "/models", "/load_lora_adapter", "/unload_lora_adapter"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What is not given vLLM takes from the model's generation config, such as a top_k.
_NOTHING_ELSE = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_RESPONSE_MIB = 64


class ServerGeneration:
    """A `generate` of `ActiveDPOLoop` that samples at a server, with the policy's adapter.

    Before a round the server is told to load the policy's adapter from its folder, and requests
    name it as their model, by its content: an answer of another model is refused. The server has to
    see that folder under the same path. Prompts of text go to `/completions`, chat messages to
    `/chat/completions`, where the server applies its model's chat template.

    With vLLM: `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora
    --max-lora-rank R`, without a parser of reasoning or tool calls.

    Args:
        model: the name of the base model at the server.
        base_url: the server's address, such as `http://localhost:8000/v1`.
        load_adapter: False for a server that cannot: the model then answers as it is there, and
            every round has responses of the same model instead of the current policy. Settings of
            sampling other than the loop's are then the server's.
        api_key_env: the environment variable that has the key. Default: no key is sent.
        concurrency: requests at once; each is for all responses to one prompt.
        timeout: seconds for one request.
        retries: how often a request is sent again after a connection error, a timeout, or the
            status 408, 425, 429 or 5xx. `Retry-After` is honored.

    Raises:
        ActiveDPOError: bad options, or the environment variable is not set. When it is called: the
            server cannot be reached, refuses a request, cannot load the adapter, or answers with
            another model or in another form.

    Examples:
        >>> from activedpo_fast import ActiveDPOLoop
        >>> from activedpo_fast.labels import CallableOracle
        >>> from activedpo_fast.training.server import ServerGeneration
        >>> loop = ActiveDPOLoop(
        ...     model, tokenizer, prompts, CallableOracle(lambda prompt, a, b: int(a < b)),
        ...     output_dir="served", dpo_args=dpo_args, rounds=1, batch_size=2,
        ...     max_completion_length=8, generate=ServerGeneration("base", base_url=vllm_url))
        >>> [record.labels_total for record in loop.run()]
        [0, 2]
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        load_adapter: bool = True,
        api_key_env: str | None = None,
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 5,
        show_progress: bool | None = None,
    ) -> None:
        check_at_least(1, concurrency=concurrency)
        key = None if api_key_env is None else key_from(api_key_env)
        self._server = JsonServer(
            base_url,
            name="generation server",
            headers={"Authorization": f"Bearer {key}"} if key else None,
            secrets=(key,) if key else (),
            timeout=timeout,
            retries=retries,
            max_mib=_RESPONSE_MIB,
        )
        self._concurrency = concurrency
        self._show_progress = show_progress
        self._loaded: str | None = None  # the last adapter
        self._told = False
        # A run records these.
        self.model = model
        self.load_adapter = load_adapter

    def __call__(
        self,
        *,
        prompts: Sequence[Text],
        num_generations: int,
        seed: int,
        adapter: Path,
        max_completion_length: int,
        temperature: float,
        top_p: float,
        chat_template_kwargs: Sequence[Mapping[str, Any]],
        **kwargs: Any,
    ) -> list[list[str]]:
        common = {
            "model": self._load(adapter) if self.load_adapter else self._as_it_is(),
            "n": num_generations,
            "max_tokens": max_completion_length,
            "temperature": temperature,
            "top_p": top_p,
            **(_NOTHING_ELSE if self.load_adapter else {}),
        }
        found: list[list[str]] = [[] for _ in prompts]

        def ask(position: int, stop: threading.Event) -> None:
            prompt = prompts[position]
            own = int(digest([seed, prompt])[:7], 16)  # servers take 32 bits
            body = {**common, "seed": own}
            found[position] = self._ask(prompt, body, chat_template_kwargs[position], stop)

        with progress_bar(
            self._show_progress, total=len(prompts), desc="generate", unit="prompt"
        ) as bar:
            for _ in ask_all(range(len(prompts)), ask, concurrency=self._concurrency):
                bar.update()
        return found

    def rehearse(
        self, prompts: Sequence[Text], chat_template_kwargs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Find out whether the server has the model, can load adapters, and answers.

        Raises:
            ActiveDPOError: it has not, cannot, or does not.
        """
        served = self._served()
        if self.model not in served:
            raise ActiveDPOError(
                f"{self._place}: it does not serve {self.model!r}, but {', '.join(served)}"
            )
        if self.load_adapter:
            self._try_loading()
        body = {"model": self.model, "n": 1, "max_tokens": 2}
        self._ask(prompts[0], body, chat_template_kwargs[0], threading.Event())

    @property
    def _place(self) -> str:
        return f"generation server {self._server.base_url}"

    # -- adapters --------------------------------------------------------------------------------

    def _load(self, adapter: Path) -> str:
        """Have the server load an adapter, unless it has; return its name there."""
        adapter = adapter.resolve()
        sums = [checksum_of_file(adapter / name) for name in _ADAPTER_FILES]
        name = f"activedpo-{digest([str(adapter), *sums])[:16]}"
        if name not in self._served():
            body = {"lora_name": name, "lora_path": str(adapter)}
            try:
                self._server.request("POST", _LOAD, body, again=False, text=True)
            except ActiveDPOError as error:
                raise ActiveDPOError(
                    f"{error}; it was to load the adapter {adapter}, which it has to see under "
                    "this path, and with a rank that it allows (vLLM: --max-lora-rank)"
                ) from None
        if self._loaded not in (None, name):
            # Only to make room: it is not named again.
            with suppress(ActiveDPOError):
                self._server.request("POST", _UNLOAD, {"lora_name": self._loaded}, text=True)
        self._loaded = name
        return name

    def _as_it_is(self) -> str:
        """Return the model's name; say once what its responses are."""
        if not self._told:
            logger.warning(
                "%s: every round has responses of %s as it is there, not of the current policy "
                "(load_adapter is false)",
                self._place,
                self.model,
            )
        self._told = True
        return self.model

    def _try_loading(self) -> None:
        """Refuse a server that does not load adapters."""
        nothing = {"lora_name": "", "lora_path": ""}
        try:
            self._server.request("POST", _LOAD, nothing, again=False, text=True)
        except RequestRefused:
            return  # as it should: no adapter was named
        except NotThere:
            raise ActiveDPOError(
                f"{self._place}: it does not load adapters while it runs, so that responses would "
                "not be the current policy's: start vLLM with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or set load_adapter to false to sample "
                "from the model as it is there"
            ) from None

    def _served(self) -> list[str]:
        """Return the names of the models and adapters that the server has."""
        value = self._server.request("GET", _MODELS)
        try:
            return [str(model["id"]) for model in value["data"]]
        except (LookupError, TypeError):
            raise self._unlike(value, "data with an id each") from None

    # -- responses -------------------------------------------------------------------------------

    def _ask(
        self,
        prompt: Text,
        body: Mapping[str, Any],
        template_kwargs: Mapping[str, Any],
        stop: threading.Event,
    ) -> list[str]:
        """Return the responses to one prompt."""
        if isinstance(prompt, str):
            path, request = "/completions", {**body, "prompt": prompt}
        else:
            if "tools" in template_kwargs:
                raise ActiveDPOError(
                    "tools cannot be sent to a generation server: sample with a function that "
                    "passes them (see Generate)"
                )
            path, request = "/chat/completions", {**body, "messages": _as_sent(prompt)}
            if template_kwargs:
                request["chat_template_kwargs"] = dict(template_kwargs)
        value = self._server.request("POST", path, request, stop=stop)
        ours = body["model"] != self.model  # the base model may be answered for by another name
        if ours and isinstance(value, dict) and value.get("model") != body["model"]:
            raise ActiveDPOError(
                f"{self._place}: it answered with the model {value.get('model')!r}, asked for was "
                f"{body['model']!r}: responses have to be of the current policy"
            )
        try:
            choices = sorted(value["choices"], key=lambda choice: choice.get("index", 0))
            return [self._text(choice, chat=not isinstance(prompt, str)) for choice in choices]
        except (LookupError, TypeError, AttributeError):
            raise self._unlike(value, "choices with a text or a message each") from None

    def _text(self, choice: Mapping[str, Any], *, chat: bool) -> str:
        if chat:
            message = choice["message"]
            for name in ("reasoning_content", "reasoning", "tool_calls"):
                if message.get(name):
                    raise ActiveDPOError(
                        f"{self._place}: it takes {name} out of the responses, which have to be "
                        "whole: start it without a parser of reasoning or tool calls"
                    )
            text = (message.get("content") or "").strip()
        else:
            text = choice["text"]
        # A lone half of a surrogate pair can be in JSON, but in no file.
        return str(text.encode(errors="replace").decode())

    def _unlike(self, value: Any, expected: str) -> ActiveDPOError:
        said = self._server.shown(json.dumps(value))
        return ActiveDPOError(
            f"{self._place}: the answer has no {expected}, it is {said}: does it have OpenAI's "
            "interface?"
        )


def _as_sent(messages: Sequence[Message]) -> list[Message]:
    """Return messages as OpenAI's interface has them: the arguments of calls as JSON texts.

    Servers read them before the chat template sees them.
    """
    return [
        {**message, "tool_calls": [_sent_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _sent_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if function is None or isinstance(function.get("arguments", ""), str):
        return call
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
