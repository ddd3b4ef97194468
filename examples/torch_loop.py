"""ActiveDPO in a hand-written DPO loop: no trainer, just torch, transformers and PEFT.

    python examples/torch_loop.py

Three rounds: sample responses, pick pairs, label them, take gradient steps on all labels so far.
The features of earlier labeled pairs are computed again each round, at the current weights.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from activedpo_fast import ActiveDPOSelector, Selection, generate_responses
from activedpo_fast.demo import demo_prompts, load_demo_model, synopsis_labels

BETA = 0.1
torch.manual_seed(0)
model, tokenizer = load_demo_model()
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-4)
selector = ActiveDPOSelector(model, processing_class=tokenizer, beta=BETA)


def logp(prompt: str, response: str) -> torch.Tensor:
    """Return log π(response | prompt), including the end-of-text token."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + response + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum()


def dpo_loss(example: dict[str, str]) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = logp(example["prompt"], example["chosen"]) - logp(
            example["prompt"], example["rejected"]
        )
    margin = (
        logp(example["prompt"], example["chosen"])
        - logp(example["prompt"], example["rejected"])
        - reference
    )
    return -torch.nn.functional.logsigmoid(BETA * margin)


prompts = demo_prompts("pool")
history: list[Selection] = []
examples: list[dict[str, str]] = []
for step in range(3):
    pool = generate_responses(
        model,
        tokenizer,
        prompts[20 * step : 20 * (step + 1)],
        num_generations=2,
        max_completion_length=24,
        temperature=0.8,
        seed=step,
    )
    picked = selector.select(pool, 8, labeled=history)
    history.append(picked)
    examples += picked.to_dataset(synopsis_labels(picked, pool)).to_list()
    model.train()
    for _ in range(2):
        losses = []
        for example in examples:
            loss = dpo_loss(example)
            (loss / len(examples)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    print(f"round {step}: {len(examples)} labels, mean DPO loss {sum(losses) / len(losses):.4f}")
