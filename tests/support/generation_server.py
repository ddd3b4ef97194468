"""A small server with vLLM's interface, behind which a tiny transformers model samples.

The texts are the model's own, with the adapter that a request names: nothing is made up.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.support.servers import Reply, Request

BASE = "base"


class GenerationServer:
    """Answers the requests of `serving`.

    Args:
        runtime_adapters: whether adapters can be loaded, as with vLLM's
            VLLM_ALLOW_RUNTIME_LORA_UPDATING.

    Attributes:
        adapters: the folder of each adapter that is loaded, by name.
        answers: (model, prompt, its texts) of every answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        runtime_adapters: bool = True,
    ) -> None:
        self._base, self._tokenizer = model, tokenizer
        self._runtime_adapters = runtime_adapters
        self._with_adapters: PeftModel | None = None
        self._lock = threading.Lock()
        self.adapters: dict[str, str] = {}
        self.answers: list[tuple[str, Any, list[str]]] = []

    def __call__(self, request: Request) -> Reply:
        with self._lock:
            if request.path == "/v1/models":
                return Reply({"data": [{"id": name} for name in (BASE, *self.adapters)]})
            if request.path.endswith("_lora_adapter") and self._runtime_adapters:
                load = request.path == "/v1/load_lora_adapter"
                return self._load(request.body) if load else self._unload(request.body)
            if request.path in ("/v1/completions", "/v1/chat/completions"):
                return self._complete(request.body, chat="chat" in request.path)
            return Reply({"detail": "Not Found"}, 404)

    def _load(self, body: dict[str, Any]) -> Reply:
        name, path = body["lora_name"], body["lora_path"]
        if not name or not path:
            return _error("Both 'lora_name' and 'lora_path' must be provided.", 400)
        if name in self.adapters:
            return _error(f"The lora adapter '{name}' has already been loaded.", 400)
        if not (Path(path) / "adapter_config.json").exists():
            return _error(f"No adapter found for {path}", 404)
        if self._with_adapters is None:
            self._with_adapters = PeftModel.from_pretrained(self._base, path, adapter_name=name)
        else:
            self._with_adapters.load_adapter(path, adapter_name=name)
        self.adapters[name] = path
        return Reply(f"Success: LoRA adapter '{name}' added successfully.".encode())

    def _unload(self, body: dict[str, Any]) -> Reply:
        name = body["lora_name"]
        if self.adapters.pop(name, None) is None:
            return _error(f"The lora adapter '{name}' cannot be found.", 404)
        return Reply(f"Success: LoRA adapter '{name}' removed successfully.".encode())

    def _complete(self, body: dict[str, Any], *, chat: bool) -> Reply:
        name, prompt = body["model"], body["messages" if chat else "prompt"]
        if name not in (BASE, *self.adapters):
            return _error(f"The model `{name}` does not exist.", 404)
        if chat:
            text = self._tokenizer.apply_chat_template(
                prompt,
                tokenize=False,
                add_generation_prompt=True,
                **body.get("chat_template_kwargs", {}),
            )
        else:
            text = prompt
        texts = self._sample(name, text, body)
        self.answers.append((name, prompt, texts))
        choices = [
            {"index": n, "message": {"role": "assistant", "content": text}}
            if chat
            else {"index": n, "text": text}
            for n, text in enumerate(texts)
        ]
        return Reply({"model": name, "choices": choices[::-1]})  # in any order

    def _sample(self, name: str, text: str, body: dict[str, Any]) -> list[str]:
        ids = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        model: Any = self._base
        if self._with_adapters is not None:
            model = self._with_adapters
            if name in self.adapters:
                model.set_adapter(name)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(body.get("seed", 0))
            sample = {
                "input_ids": ids,
                "do_sample": True,
                "num_return_sequences": body["n"],
                "max_new_tokens": body["max_tokens"],
                "temperature": body.get("temperature", 1.0),
                "top_p": body.get("top_p", 1.0),
                "top_k": 0,
            }
            if name == BASE and self._with_adapters is not None:
                with model.disable_adapter():
                    output = model.generate(**sample)
            else:
                output = model.generate(**sample)
        return [
            str(self._tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True))
            for row in output
        ]


def _error(message: str, status: int) -> Reply:
    return Reply({"error": {"message": message, "code": status}}, status)
