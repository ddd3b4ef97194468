"""What an evaluation found for each held-out prompt or pair, on disk; differences between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activedpo_fast._files import read_json
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.training.checksums import check, write_recorded
from activedpo_fast.training.run_folder import folder_to_evaluate, round_folders

REWARDS = "heldout.json"  # of `HeldoutReward`
RESPONSES = "heldout-responses.json"  # of `HeldoutWinRate`
PREFERENCES = "heldout-preferences.json"  # of `HeldoutPreferences`

Values = NDArray[np.float64]


def write_heldout(output_dir: Path, name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Put what was found into the folder that is evaluated; return what the start's has.

    Raises:
        ActiveDPOError: the start's is gone or has changed, or is of other prompts or pairs.
    """
    start, folder = output_dir / "start", folder_to_evaluate(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_recorded(folder / name, json.dumps(found).encode())
    check(start, name)
    first: dict[str, Any] = read_json(start / name)
    for key, values in found.items():
        if len(first.get(key, ())) != len(values):
            raise ActiveDPOError(
                f"{start / name} is of other held-out data, which the metrics cannot be compared "
                "with: give the same, or use another output_dir"
            )
    return first


def heldout_files(output_dir: Path) -> list[Path]:
    """List the files of the rewards of a run's prompts: of the start, and of each round."""
    folders = (output_dir / "start", *round_folders(output_dir).values())
    return [folder / REWARDS for folder in folders if (folder / REWARDS).exists()]


def heldout_rewards(path: Path) -> Values:
    """Read the mean reward of each prompt's responses."""
    return np.array(read_json(path)["rewards"], dtype=np.float64)


def paired(a: Values, b: Values) -> tuple[float, float]:
    """Return the mean of a - b over prompts and its standard error, 0 for a single prompt."""
    return float((a - b).mean()), standard_error(a - b)


def standard_error(values: Values) -> float:
    """Return the standard error of the mean; 0 for a single value, which does not tell."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
