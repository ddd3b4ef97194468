"""The table of DPOConfig's fields against the installed TRL, docs/trl.md and the refusals."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from activedpo_fast import ActiveDPOError
from activedpo_fast.training.options import DPO_FIELDS, INHERITED
from activedpo_fast.training.trl import dpo_config, selector_settings

trl = pytest.importorskip("trl")

_HINT = (
    "add it to activedpo_fast/training/options.py and docs/trl.md: does it change log π, the "
    "gradients or the selection?"
)


def test_every_field_is_in_the_table_once() -> None:
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(trl.DPOConfig)} - inherited
    grouped = [name for group in INHERITED for name in group.names]
    for there, listed in ((own, list(DPO_FIELDS)), (inherited, grouped)):
        assert not there - set(listed), f"DPOConfig has a new field; {_HINT}"
        assert not set(listed) - there, "DPOConfig has lost a field; take it out of the table"
        assert len(listed) == len(set(listed))


def test_the_table_in_the_docs_is_the_packages() -> None:
    text = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")
    section = text[text.index("## DPOConfig") :].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    expected = [
        f"| `{name}` | {field.status} | {field.why} |" for name, field in DPO_FIELDS.items()
    ]
    for group in INHERITED:
        names = ", ".join(f"`{name}`" for name in group.names)
        expected.append(f"| {names} | {group.status} | {group.why} |")
    assert rows == expected


def test_other_arguments_than_trls() -> None:
    with pytest.raises(ActiveDPOError, match="expected a trl.DPOConfig, got TrainingArguments"):
        selector_settings(TrainingArguments(use_cpu=True))


# For every field that has a refused value: such values with their message, and values that pass.
_REFUSED: dict[str, tuple[list[dict[str, Any]], str, list[dict[str, Any]]]] = {
    "ld_alpha": (
        [{"ld_alpha": 0.5}, {"ld_alpha": 0.0}],
        "ld_alpha=0.[05] gives a response another",
        [{"ld_alpha": None}, {"ld_alpha": 1.0}],
    ),
    "f_divergence_type": (
        [
            {"f_divergence_type": "forward_kl"},
            {"f_divergence_type": "js_divergence"},
            {"f_divergence_type": "alpha_divergence"},
        ],
        "f_divergence_type='.*' has another implicit",
        [
            {"f_divergence_type": "reverse_kl"},
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        ],
    ),
    "sync_ref_model": (
        [{"sync_ref_model": True}],
        "sync_ref_model=True changes the reference",
        [{"ref_model_sync_steps": 3}],
    ),
    "max_length": (
        [{"max_length": 1}, {"max_length": 0}],
        "max_length=[01] leaves no token",
        [{"max_length": 2}, {"max_length": None}],
    ),
    "truncation_mode": (
        [{"truncation_mode": "keep_middle"}],
        "'keep_middle' is neither",
        [{"truncation_mode": "keep_start"}],
    ),
}


@pytest.mark.parametrize("field", _REFUSED)
def test_options_that_selection_cannot_follow_are_refused_by_name(
    field: str, tmp_path: Path
) -> None:
    refused, message, passing = _REFUSED[field]
    for options in refused:
        with pytest.raises(ActiveDPOError, match=message) as caught:
            selector_settings(dpo_config(output_dir=str(tmp_path), **options))
        assert "\n" not in str(caught.value)
    for options in passing:
        selector_settings(dpo_config(output_dir=str(tmp_path), **options))


def test_every_refused_field_has_its_case() -> None:
    """`loss_type` is tested in test_losses.py."""
    refused = {name for name, field in DPO_FIELDS.items() if field.status == "refused"}
    assert refused <= set(_REFUSED) <= set(DPO_FIELDS)
