"""Settings of the whole suite."""

from __future__ import annotations

import os

# Before any import of torch or a Hugging Face library.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Tiny models: starting threads costs more than they compute.
torch.set_num_threads(1)
