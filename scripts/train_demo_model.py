#!/usr/bin/env python3
"""Train the demo's small language model from scratch, on a CPU, in about an hour.

A byte-level BPE tokenizer and a 4-million-parameter Llama are trained on the train split of the
demo data: first on whole texts (description, "TL;DR:", synopsis), then, as supervised
fine-tuning, on the synopsis alone. Both phases run for a given time rather than a number of
steps, so a slow machine gives a weaker model, not a later one. The same command continues an
interrupted run from its last checkpoint.

Example:
    python scripts/train_demo_model.py train --minutes 41 --sft-minutes 8
    python scripts/train_demo_model.py samples docs/demo_samples.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve their neighbors

import pyarrow.parquet as pq
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ASSETS = Path("activedpo_fast/demo/assets")
END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY, POSITIONS, IGNORED = 4096, 512, -100
UNKNOWN = 1  # the padding token's id, which replaces hidden input tokens
CHUNK = 2048  # number of texts sorted by length together; small, to keep the batches random
TEMPERATURE, NEW_TOKENS = 0.7, 40


@dataclass
class Example:
    """A tokenized text; the response is everything from position `prompt_length` on."""

    ids: list[int]
    prompt_length: int


@dataclass
class Progress:
    """The progress of a training phase, saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Phase:
    """One of the two training phases: its name, its duration, and what it optimizes."""

    name: str
    seconds: float
    peak_lr: float
    response_only: bool
    keep_best: bool


def prompt_of(row: dict[str, str]) -> str:
    """Return the text that the model is given."""
    return f"{row['description']}\n\nTL;DR:"


def response_of(row: dict[str, str]) -> str:
    """Return the target text; its leading space leaves the prompt's tokens unchanged."""
    return f" {row['synopsis']}{END}"


def read_split(name: str) -> list[dict[str, str]]:
    """Read one split of the demo data."""
    return pq.read_table(ASSETS / "data" / f"{name}.parquet").to_pylist()


def train_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE: any text can be encoded, and decoding returns it unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (prompt_of(row) + " " + row["synopsis"] for row in rows)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> list[Example]:
    """Encode every text, and assert what the demo relies on: prefixes and round trips hold."""
    prompts = tokenizer([prompt_of(row) for row in rows])["input_ids"]
    texts = [prompt_of(row) + response_of(row) for row in rows]
    examples = []
    for text, prompt, ids in zip(texts, prompts, tokenizer(texts)["input_ids"], strict=True):
        assert ids[: len(prompt)] == prompt, f"the response changes the prompt's tokens: {text!r}"
        assert tokenizer.decode(ids) == text, f"decoding does not give the text back: {text!r}"
        assert len(ids) <= POSITIONS, f"{len(ids)} tokens do not fit: {text!r}"
        examples.append(Example(ids, len(prompt)))
    return examples


def new_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    """Return an untrained Llama in the usual proportions for this size."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=round(hidden * 8 / 3 / 16) * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def collate(batch: list[Example], response_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs padded on the right, and the token to predict at every position.

    The padding needs no attention mask: it comes last, and attention is causal.
    """
    width = max(len(e.ids) for e in batch) - 1
    inputs = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.full((len(batch), width), IGNORED)
    for row, example in enumerate(batch):
        length = len(example.ids) - 1
        start = example.prompt_length - 1 if response_only else 0
        inputs[row, :length] = torch.tensor(example.ids[:-1])
        targets[row, start:length] = torch.tensor(example.ids[start + 1 :])
    return inputs, targets


def batches(examples: list[Example], size: int, rng: random.Random) -> list[list[Example]]:
    """Return an epoch's random batches of texts of similar length, at most `size` tokens each."""
    shuffled = rng.sample(examples, len(examples))
    result: list[list[Example]] = []
    for start in range(0, len(shuffled), CHUNK):
        current: list[Example] = []
        for example in sorted(shuffled[start : start + CHUNK], key=lambda e: len(e.ids)):
            if current and (len(current) + 1) * len(example.ids) > size:
                result.append(current)
                current = []
            current.append(example)
        result.append(current)
    rng.shuffle(result)
    return result


def mean_loss(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy per predicted token; logits are computed only where targets exist."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    wanted = targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[wanted]).float(), targets[wanted])


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, examples: list[Example]) -> dict[str, float]:
    """Return mean loss per token in full precision, over all tokens and over responses alone."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss and count of all tokens, then of responses
    for batch in batches(examples, 4096, random.Random(0)):
        inputs, targets = collate(batch, response_only=False)
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float()
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
        responses = collate(batch, response_only=True)[1].flatten() != IGNORED
        sums += torch.stack(
            [losses.sum(), (targets != IGNORED).sum(), losses[responses].sum(), responses.sum()]
        )
    model.train()
    return {"all": float(sums[0] / sums[1]), "response": float(sums[2] / sums[3])}


def optimizers(model: LlamaForCausalLM, muon: bool) -> list[torch.optim.Optimizer]:
    """Return AdamW, or Muon for the weight matrices, which learns more from few tokens."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    betas = (0.9, 0.95)
    if not muon:
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, lr=0.0, betas=betas)]
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.0, betas=betas, weight_decay=0.0),
    ]


def learning_rate(done: float, peak: float) -> float:
    """Linear warm-up over the first 2% of the time, then a cosine down to 2% of the peak."""
    if done < 0.02:
        return peak * max(done, 0.0005) / 0.02
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def save_atomically(content: object, path: Path) -> None:
    """Save without ever leaving a partial checkpoint behind."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def endless(
    examples: list[Example], size: int, seed: int, progress: Progress
) -> Iterator[list[Example]]:
    """Yield batches, epoch after epoch, starting from `progress`."""
    while True:
        epoch = batches(examples, size, random.Random(f"{seed}/{progress.epoch}"))
        while progress.batch < len(epoch):
            progress.batch += 1
            yield epoch[progress.batch - 1]
        progress.epoch, progress.batch = progress.epoch + 1, 0


def run_phase(
    phase: Phase, model: LlamaForCausalLM, data: dict[str, list[Example]], args: argparse.Namespace
) -> Progress:
    """Train until the phase's time is spent (evaluation and saving do not count)."""
    path = args.work / f"{phase.name}.pt"
    opts = optimizers(model, args.muon)
    progress, best_weights = Progress(), None
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(state)
        progress, best_weights = Progress(**saved["progress"]), saved["best_weights"]

    def checkpoint() -> None:
        nonlocal best_weights
        loss = heldout_loss(model, data["heldout"])
        if phase.keep_best and loss["response"] < progress.best:
            progress.best = loss["response"]
            best_weights = {k: v.clone() for k, v in model.state_dict().items()}
        entry = {"step": progress.step, "tokens": progress.tokens, **loss}
        progress.history.append({k: round(v, 4) for k, v in entry.items()})
        tqdm.write(f"{phase.name} {json.dumps(progress.history[-1])}")
        content = {
            "model": model.state_dict(),
            "optimizers": [opt.state_dict() for opt in opts],
            "progress": vars(progress),
            "best_weights": best_weights,
        }
        save_atomically(content, path)

    bar = tqdm(
        total=round(phase.seconds), initial=round(progress.seconds), desc=phase.name, unit="s"
    )
    source = endless(data["train"], args.batch_tokens, args.seed, progress)
    if progress.step == 0 and progress.seconds < phase.seconds:
        checkpoint()
    while progress.seconds < phase.seconds:
        started = time.perf_counter()
        inputs, targets = collate(next(source), phase.response_only)
        if args.token_dropout:
            inputs = torch.where(torch.rand(inputs.shape) < args.token_dropout, UNKNOWN, inputs)
        rate = learning_rate(progress.seconds / phase.seconds, phase.peak_lr)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mean_loss(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate
            opt.step()
            opt.zero_grad()
        progress.step += 1
        progress.tokens += inputs.numel()
        progress.seconds += time.perf_counter() - started
        bar.n = min(round(progress.seconds), bar.total)
        bar.set_postfix(
            loss=f"{loss.item():.3f}",
            epoch=progress.epoch,
            speed=f"{progress.tokens / progress.seconds:.0f} tokens/s",
        )
        if progress.step % args.every == 0 or progress.seconds >= phase.seconds:
            checkpoint()
    bar.close()
    if phase.keep_best and best_weights is not None:
        model.load_state_dict(best_weights)
    return progress


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as float16 (half the size) and its tokenizer, in transformers' format."""
    folder.mkdir(parents=True, exist_ok=True)
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half = half.half()
    half.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name every release knows
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only the owner can read


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the exported model in float32, and its tokenizer, from disk only."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def report(phase: Phase, progress: Progress, examples: list[Example]) -> dict[str, object]:
    """Return the entry of one phase in training.json."""
    epoch_tokens = sum(len(e.ids) - 1 for e in examples)
    return {
        "seconds": round(progress.seconds),
        "steps": progress.step,
        "epochs": round(progress.tokens / epoch_tokens, 2),
        "tokens_seen": progress.tokens,
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9)),
        "peak_learning_rate": phase.peak_lr,
        "loss_on": "response" if phase.response_only else "all tokens",
        "kept": "best held-out response loss" if phase.keep_best else "last",
        "heldout_loss": progress.history,
    }


def train(args: argparse.Namespace) -> None:
    """Tokenizer, pretraining, fine-tuning, export."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    rows = {name: read_split(name) for name in ("train", "heldout", "pool")}
    if not (args.work / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(rows["train"]).save_pretrained(args.work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer", local_files_only=True)
    data = {name: tokenize(tokenizer, members) for name, members in rows.items()}
    tokens = {name: sum(len(e.ids) for e in members) for name, members in data.items()}
    model = new_model(tokenizer, args.hidden, args.layers)
    print(f"{model.num_parameters():,} parameters; tokens per split: {tokens}", flush=True)
    phases = [
        Phase("pretraining", args.minutes * 60, args.lr, response_only=False, keep_best=False),
        Phase("sft", args.sft_minutes * 60, args.sft_lr, response_only=True, keep_best=True),
    ]
    reports = {
        phase.name: report(phase, run_phase(phase, model, data, args), data["train"])
        for phase in phases
    }
    export(model, tokenizer, args.out)
    stored, _ = load(args.out)
    final = {
        name: {k: round(v, 5) for k, v in heldout_loss(m, data["heldout"]).items()}
        for name, m in (("float32", model), ("stored_float16", stored))
    }
    summary = {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "hidden_size": args.hidden,
        "layers": args.layers,
        "seed": args.seed,
        "optimizer": "Muon (matrices) and AdamW (the rest)" if args.muon else "AdamW",
        "batch_tokens": args.batch_tokens,
        "examples": {name: len(members) for name, members in data.items()},
        "tokens": tokens,
        **reports,
        "final_heldout_loss": final,
        "threads": args.threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (args.out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary["final_heldout_loss"], indent=2))


@torch.no_grad()
def generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, sample: bool
) -> str:
    """Generate one response, greedy or sampled at TEMPERATURE."""
    options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0} if sample else {}
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        **({"do_sample": False} | options),
    )
    new = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def samples(args: argparse.Namespace) -> None:
    """Write held-out samples, chosen only by the seed, as Markdown."""
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.out)
    rows = random.Random(args.seed).sample(read_split("heldout"), args.number)
    about = (
        f"{args.number} packages of the held-out split, drawn with seed {args.seed} and shown as "
        "they came: none was left out or exchanged. The model saw none of them in training. "
        f"The sampled synopsis uses temperature {TEMPERATURE} and no top-k or top-p. "
        f"Written by `python scripts/train_demo_model.py samples {args.path}`."
    )
    parts = ["# Samples of the demo model", about]
    torch.manual_seed(args.seed)
    for row in tqdm(rows, desc="samples", unit="sample"):
        description = "\n>\n> ".join(row["description"].split("\n\n"))
        synopses = (
            f"- **True synopsis:** {row['synopsis']}\n"
            f"- **Greedy:** {generate(model, tokenizer, prompt_of(row), False)}\n"
            f"- **Sampled:** {generate(model, tokenizer, prompt_of(row), True)}"
        )
        parts.extend([f"## {row['id']}", f"> {description}", synopses])
    args.path.write_text("\n\n".join(parts) + "\n")


def command_line() -> argparse.ArgumentParser:
    """Define the two commands and their options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, default=ASSETS / "model", help="the model's folder")
    shared.add_argument("--seed", type=int, default=0, help="seed of everything random")
    shared.add_argument("--threads", type=int, default=2, help="CPU threads")

    training = commands.add_parser(
        "train",
        help="train the model, or continue training it",
        parents=[shared],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    training.add_argument("--work", type=Path, default=Path("runs/demo_model"), help="checkpoints")
    training.add_argument("--minutes", type=float, default=41.0, help="minutes of pretraining")
    training.add_argument("--sft-minutes", type=float, default=8.0, help="minutes of fine-tuning")
    training.add_argument("--lr", type=float, default=3e-3, help="peak rate of pretraining")
    training.add_argument("--sft-lr", type=float, default=5e-4, help="peak rate of fine-tuning")
    training.add_argument("--batch-tokens", type=int, default=6144, help="tokens in a batch")
    training.add_argument("--hidden", type=int, default=256, help="hidden size")
    training.add_argument("--layers", type=int, default=4, help="layers")
    training.add_argument("--every", type=int, default=150, help="steps between checkpoints")
    training.add_argument(
        "--muon", action=argparse.BooleanOptionalAction, default=True, help="otherwise only AdamW"
    )
    training.add_argument(
        "--token-dropout", type=float, default=0.0, help="share of input tokens that are hidden"
    )
    training.set_defaults(run=train)
    sampling = commands.add_parser(
        "samples",
        help="write samples of the trained model",
        parents=[shared],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sampling.add_argument("path", type=Path, help="the Markdown file to write")
    sampling.add_argument("--number", type=int, default=10, help="number of samples")
    sampling.set_defaults(run=samples)
    return parser


def main() -> None:
    """Run the command line."""
    args = command_line().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
