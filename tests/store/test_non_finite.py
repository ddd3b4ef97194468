"""One response for which the model gives NaN: it is named, and does not spoil a store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from activedpo_fast.cli.app import main
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.extractor import FeatureExtractor
from activedpo_fast.gradients.sketch import Sketch
from activedpo_fast.pool.pool import PreferencePool
from activedpo_fast.pool.tokens import TokenizedResponse, tokenize_pool
from activedpo_fast.store.store import FeatureStore
from tests.support.models import lora, tiny_causal_lm, tiny_tokenizer


def test_it_is_skipped_if_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = PreferencePool.from_rows(
        {"id": f"p{n}", "prompt": f"The {n}", "responses": [" fox", " dog" * (n + 1)]}
        for n in range(5)
    )
    tokens, model = tokenize_pool(pool, tiny_tokenizer()), lora(tiny_causal_lm("llama"), "llama")
    rare = max(set(range(384)) - {id for s in tokens.sequences for id in s.input_ids})
    odd = tokens.sequences[5]  # the second response of p2
    ids = [*odd.input_ids[:-1], rare, odd.input_ids[-1]]
    tokens.sequences[5] = TokenizedResponse(ids, odd.completion_start)
    model.get_input_embeddings().weight.data[rare] = torch.nan

    def extractor(skip: bool) -> FeatureExtractor:
        return FeatureExtractor(
            model, Sketch("sjlt", 16), max_tokens_per_batch=30, verify=False, skip_non_finite=skip
        )

    store = FeatureStore.create(tmp_path / "s", pool, {}, skipped=[])
    with pytest.raises(ActiveDPOError, match="'p2', response 2: .*not finite.*--skip-non-finite"):
        store.fill(extractor(False), tokens)
    store.fill(extractor(True), tokens)  # the store is as good as before
    assert "item 'p2', response 2: what the model gives for it is not finite" in caplog.text
    assert store.non_finite() == [2]
    assert "10 rows, 1 of them all zeros" in FeatureStore.open(tmp_path / "s").verify()
    wanted = extractor(True).gradients(tokens).gradients
    assert torch.equal(store.load().gradients, wanted) and not wanted[5].any()

    # Neither in V nor among the picks.
    labels = tmp_path / "labels.jsonl"
    lines = [{"id": name, "pair": [0, 1], "label": 0} for name in ("p0", "p2")]
    picks = []
    for given in (lines, lines[:1]):
        labels.write_text("".join(json.dumps(line) + "\n" for line in given))
        argv = ["select", str(tmp_path / "s"), f"--labeled={labels}", "--pairs=3"]
        assert main([*argv, f"--output={tmp_path / 'picked.jsonl'}"]) == 0
        picks.append((tmp_path / "picked.jsonl").read_text())
    assert picks[0] == picks[1] and '"p2"' not in picks[0]
    assert "1 labeled pairs have rows that are not finite" in caplog.text
