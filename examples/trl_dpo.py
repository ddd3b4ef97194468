"""A plain TRL script that labels only the pairs ActiveDPO picks.

    python examples/trl_dpo.py

It trains the demo's small model for one round. The ActiveDPO part is between the two rulers; the
rest is an ordinary DPO script.
"""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from activedpo_fast import ActiveDPOSelector, generate_responses, selector_settings
from activedpo_fast.demo import demo_prompts, load_demo_model, synopsis_labels

model, tokenizer = load_demo_model()
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
args = DPOConfig(
    output_dir="runs/trl_dpo",
    beta=0.1,
    learning_rate=5e-4,
    num_train_epochs=3,
    max_length=320,
    per_device_train_batch_size=16,
    report_to=[],
    use_cpu=True,
    bf16=False,
    save_strategy="no",
    logging_steps=2,
)

# A pool has prompts with two or more responses each: from your own files (PreferencePool.load), a
# datasets.Dataset with the same columns, or sampled from the model, as here.
pool = generate_responses(
    model,
    tokenizer,
    demo_prompts("pool")[:40],
    num_generations=3,
    max_completion_length=24,
    temperature=0.8,
    seed=0,
)

# ------------------------------------------------------------------------------------ ActiveDPO
selector = ActiveDPOSelector(model, processing_class=tokenizer, **selector_settings(args))
picked = selector.select(pool, 16)
train_dataset = picked.to_dataset(synopsis_labels(picked, pool))  # 0 or 1 for each pick
# ----------------------------------------------------------------------------------------------

trainer = DPOTrainer(
    model=model, args=args, train_dataset=train_dataset, processing_class=tokenizer
)
trainer.train()
print(f"trained on {len(train_dataset)} of {len(pool.pairs())} pairs")
