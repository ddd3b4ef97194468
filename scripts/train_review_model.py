#!/usr/bin/env python3
"""Train the language model of review sentences, on a CPU, in about half an hour.

It starts from the demo's model of package descriptions. Two layers that do nothing yet are added,
and a new vocabulary is learned; each new token starts as the mean of the old tokens that spell it.
The model is then trained on a mixture of reviews, editorials, tweets and package descriptions, and
last on the reviews alone; the checkpoint of that phase with the lowest held-out loss is kept. There
are only 375,000 tokens of reviews: without hidden input tokens, and with more time, the held-out
loss rises again. The same command continues an interrupted run.

`--shape gemma` trains a model of Gemma's architecture instead, by the same two phases. It starts
from the finished Llama: one key and value head, the mean of the four; GELU with the gate scaled so
that it is close to SiLU; embeddings divided by what Gemma multiplies them by.

Examples:
    python scripts/train_review_model.py --minutes 18 --reviews-minutes 5
    python scripts/train_review_model.py --shape gemma --minutes 28 --reviews-minutes 6 \
        --lr 7e-4 --work runs/review_model_gemma --out benchmarks/claims/gemma
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from pathlib import Path

import pyarrow.parquet as pq
import review_texts
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from train_demo_model import (
    ASSETS,
    END,
    PAD,
    POSITIONS,
    VOCABULARY,
    Example,
    Phase,
    export,
    heldout_loss,
    load,
    report,
    run_phase,
)
from transformers import (
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PROMPT_WORDS = 4
MIXTURE = {"reviews": 2, "others": 1}  # repeats per epoch of the mixture; descriptions appear once
DESCRIPTIONS = 9000
SILU_AS_GELU = 1.702  # silu(x) is close to 1.702 gelu(x / 1.702)
ADDED_AFTER = (1, 3)  # layers, counted from 0, after which a new one is added


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a separate byte-level BPE, so that reviews take fewer tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )


def deeper_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the demo's model with two more layers, which add nothing yet, and the new tokens."""
    old, old_tokenizer = load(ASSETS / "model")
    layers = len(old.model.layers)
    model = LlamaForCausalLM(
        LlamaConfig.from_dict(
            {
                **old.config.to_dict(),
                "num_hidden_layers": layers + len(ADDED_AFTER),
                "vocab_size": len(tokenizer),
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "dtype": "float32",
            }
        )
    )
    with torch.no_grad():
        place = 0
        for number in range(layers):
            state = old.model.layers[number].state_dict()
            model.model.layers[place].load_state_dict(state)
            place += 1
            if number in ADDED_AFTER:
                added = model.model.layers[place]
                added.load_state_dict(state)
                added.self_attn.o_proj.weight.zero_()
                added.mlp.down_proj.weight.zero_()
                place += 1
        model.model.norm.load_state_dict(old.model.norm.state_dict())
        embedding, own = old.model.embed_tokens.weight, model.model.embed_tokens.weight
        for id in range(len(tokenizer)):
            text = tokenizer.decode([id])
            pieces = (
                [old_tokenizer.convert_tokens_to_ids(text)]
                if text in (END, PAD)
                else old_tokenizer(text)["input_ids"]
            )
            own[id] = embedding[pieces].mean(dim=0)
    return model.train()


def gemma_from_llama(tokenizer: PreTrainedTokenizerFast) -> GemmaForCausalLM:
    """Return a Gemma that starts close to the finished Llama, apart from its keys and values."""
    llama, _ = load(ASSETS / "reviews" / "model")
    old = llama.config
    model = GemmaForCausalLM(
        GemmaConfig(
            vocab_size=len(tokenizer),
            hidden_size=old.hidden_size,
            intermediate_size=old.intermediate_size,
            num_hidden_layers=old.num_hidden_layers,
            num_attention_heads=old.num_attention_heads,
            num_key_value_heads=1,
            head_dim=old.head_dim,
            hidden_act="gelu_pytorch_tanh",
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    scale = old.hidden_size**0.5
    weights = dict(llama.state_dict())
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] = weights[name] - 1  # Gemma multiplies by 1 + weight
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weights[name].view(old.num_attention_heads, old.head_dim, -1)
            weights[name] = heads.mean(dim=0)
        elif name.endswith("gate_proj.weight"):
            weights[name] = weights[name] / SILU_AS_GELU
        elif name.endswith("up_proj.weight"):
            weights[name] = weights[name] * SILU_AS_GELU
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = weights[name] / scale
    weights["model.norm.weight"] = (weights["model.norm.weight"] + 1) * scale - 1
    model.load_state_dict(weights)
    return model.train()


def example(tokenizer: PreTrainedTokenizerFast, text: str, prompt: str) -> Example:
    """Encode a text that starts with `prompt`; the rest must not change the prompt's tokens."""
    ids = tokenizer(text + END)["input_ids"][:POSITIONS]
    start = tokenizer(prompt)["input_ids"]
    assert ids[: len(start)] == start, f"the response changes the prompt's tokens: {text!r}"
    return Example(ids, len(start))


def prompt_of(text: str) -> str:
    """Return the first words, without the space that follows."""
    return " ".join(text.split()[:PROMPT_WORDS])


def train(args: argparse.Namespace) -> None:
    """Train the tokenizer, run both phases, and export."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    folder = review_texts.fetch(args.texts)
    sentences = [s for name in review_texts.REVIEWS for s in review_texts.read(folder, name)]
    others = [s.text for name in review_texts.OTHERS for s in review_texts.read(folder, name)]
    rows = pq.read_table(ASSETS / "data" / "train.parquet").to_pylist()
    descriptions = [
        row["description"] for row in random.Random(args.seed).sample(rows, DESCRIPTIONS)
    ]
    reviews = {
        "train": [s.text for s in sentences if not s.heldout],
        "heldout": [s.text for s in sentences if s.heldout],
    }
    if args.shape == "gemma":
        _, llama_tokenizer = load(ASSETS / "reviews" / "model")
        llama_tokenizer.save_pretrained(args.work / "tokenizer")
    elif not (args.work / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(reviews["train"] + others + descriptions[:1000]).save_pretrained(
            args.work / "tokenizer"
        )
    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer", local_files_only=True)
    review_examples = {
        name: [example(tokenizer, text, prompt_of(text)) for text in texts]
        for name, texts in reviews.items()
    }
    mixture = (
        MIXTURE["reviews"] * review_examples["train"]
        + MIXTURE["others"] * [example(tokenizer, text, "") for text in others]
        + [example(tokenizer, text, "") for text in descriptions]
    )
    phases = {
        "mixture": (Phase("mixture", args.minutes * 60, args.lr, False, False), mixture),
        "reviews": (
            Phase("reviews", args.reviews_minutes * 60, args.reviews_lr, False, True),
            review_examples["train"],
        ),
    }
    model = (deeper_model if args.shape == "llama" else gemma_from_llama)(tokenizer)
    print(
        f"{model.num_parameters():,} parameters; tokens: "
        f"{ {name: sum(len(e.ids) for e in data) for name, (_, data) in phases.items()} }",
        flush=True,
    )
    reports = {}
    for name, (phase, examples) in phases.items():
        data = {"train": examples, "heldout": review_examples["heldout"]}
        reports[name] = report(phase, run_phase(phase, model, data, args), examples)
    export(model, tokenizer, args.out)
    stored, _ = load(args.out)
    summary = {
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "layers": model.config.num_hidden_layers,
        "seed": args.seed,
        "optimizer": "Muon (matrices) and AdamW (the rest)",
        "batch_tokens": args.batch_tokens,
        "token_dropout": args.token_dropout,
        "examples": {name: len(texts) for name, texts in reviews.items()},
        **reports,
        "final_heldout_loss": {
            k: round(v, 5) for k, v in heldout_loss(stored, review_examples["heldout"]).items()
        },
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


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ASSETS / "reviews" / "model", help="the model's folder"
    )
    parser.add_argument(
        "--texts", type=Path, default=Path("runs/reviews"), help="folder to download the texts to"
    )
    parser.add_argument("--shape", choices=("llama", "gemma"), default="llama", help="architecture")
    parser.add_argument("--work", type=Path, default=Path("runs/review_model"), help="checkpoints")
    parser.add_argument("--minutes", type=float, default=18.0, help="minutes on the mixture")
    parser.add_argument("--reviews-minutes", type=float, default=5.0, help="minutes on reviews")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate of the mixture")
    parser.add_argument("--reviews-lr", type=float, default=2e-4, help="peak rate of reviews alone")
    parser.add_argument("--batch-tokens", type=int, default=6144, help="tokens in a batch")
    parser.add_argument(
        "--token-dropout",
        type=float,
        default=0.15,
        help="share of input tokens that are hidden, against overfitting",
    )
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.set_defaults(muon=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
