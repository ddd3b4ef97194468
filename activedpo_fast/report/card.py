"""A model card of a run's last adapter, in the form of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.report.labels import label_counts, longer_preferred
from activedpo_fast.report.page import summary
from activedpo_fast.report.reading import RunData
from activedpo_fast.report.tables import Rows, labels_table, rounds_table
from activedpo_fast.training.run_folder import round_folders

_CITATIONS = """\
```bibtex
@article{lin2025activedpo,
  title   = {{ActiveDPO: Active Direct Preference Optimization for Sample-Efficient Alignment}},
  author  = {Lin, Xiaoqiang and others},
  journal = {arXiv preprint arXiv:2505.19241},
  year    = {2025}
}

@inproceedings{rafailov2023dpo,
  title     = {{Direct Preference Optimization: Your Language Model is Secretly a Reward Model}},
  author    = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D.
               and Ermon, Stefano and Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems 36},
  year      = {2023}
}
```"""


def model_card(run: RunData) -> str:
    """Return the card as Markdown with its YAML header.

    Raises:
        ActiveDPOError: the run has no trained round.
    """
    folder = last_adapter(run)
    base = str(run.settings.get("model", ""))
    # The Hub reads `base_model` as the id of a repository; a folder is none.
    on_hub = (
        base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    )
    named = base if on_hub else Path(base).name  # a folder's path means nothing to others
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft",
        model_name=run.name,
        tags=["trl", "dpo", "active-learning", "preference-optimization", "activedpo-fast"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {run.name}",
        f"A LoRA adapter for `{named or 'a model that the run does not name'}`, trained with DPO "
        f"(TRL's `DPOTrainer`) on preference pairs that were chosen in rounds by the strategy "
        f"`{run.strategy}` of activedpo-fast. It is the adapter of `{folder.name}`.",
        f"## Use\n\n{_usage(named)}",
        f"## Labels\n\n{_labels(run)}",
        f"## Training\n\n{summary(run)}\n\n{_markdown(rounds_table(run))}\n\n{_training(run)}",
        f"## Versions\n\n{_versions(run)}",
        f"## Citations\n\n{_CITATIONS}",
    ]
    return str(ModelCard("\n\n".join(parts) + "\n", ignore_metadata_errors=False))


def last_adapter(run: RunData) -> Path:
    """Return the folder of the last trained round of a run."""
    folders = round_folders(run.folder).values()
    trained = [folder for folder in folders if (folder / "adapter").exists()]
    if not trained:
        raise ActiveDPOError(f"{run.folder}: no round is trained, so there is no model to describe")
    return trained[-1]


def _usage(base: str) -> str:
    return (
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base!r})\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/adapter")\n'
        "```"
    )


def _labels(run: RunData) -> str:
    counts = label_counts(run.picks)
    facts = [
        f"{counts['0'] + counts['1']} preferences, {counts['tie']} ties, {counts['skip']} skipped.",
        f"The longer response was preferred: {longer_preferred(run.picks)}.",
    ]
    oracle = (run.settings.get("extra_settings") or {}).get("oracle")
    if isinstance(oracle, dict) and "kind" in oracle:
        facts.append(f"Source of the labels: `{oracle['kind']}`.")
    return " ".join(facts) + f"\n\n{_markdown(labels_table(run))}"


def _training(run: RunData) -> str:
    dpo = run.settings.get("dpo", {})
    lora = run.settings.get("lora", {})
    shown = {
        "β": dpo.get("beta"),
        "loss": dpo.get("loss_type"),
        "learning rate": dpo.get("learning_rate"),
        "epochs per round": dpo.get("num_train_epochs"),
        "LoRA r": lora.get("r"),
        "LoRA α": lora.get("lora_alpha"),
        "trained on": run.settings.get("train_on"),
        "each round starts from": run.settings.get("start_from"),
        "reference": run.settings.get("reference"),
        "seed": run.settings.get("seed"),
    }
    return "\n".join(f"- {name}: {value}" for name, value in shown.items() if value is not None)


def _versions(run: RunData) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in run.versions.items()) or "unknown"


def _markdown(rows: Rows) -> str:
    if not rows:
        return ""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(rows[0]), "|" + "---:|" * len(rows[0]), *map(line, rows[1:])])
