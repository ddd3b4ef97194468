"""Peers whose hooks project each module's gradient as it is formed, and never hold a whole one."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

from activedpo_fast.pool.tokens import TokenizedPool
from benchmarks.rows.batches import (
    TOKENS_A_BATCH,
    RowsInOrder,
    collate,
    dimension,
    log_likelihood,
    plan_batches,
    private_copy,
    scored_labels,
    trainable,
)
from benchmarks.rows.quiet_bergson import import_bergson, quiet

Compute = Callable[[], Tensor]  # -> float32 [R, k'], in pool order


def module_side(model: nn.Module, k: int) -> tuple[int, int]:
    """(p, k'): the p for which p x p numbers per LoRA matrix come nearest to k, and their total
    number."""
    modules = len(trainable(model))
    low = max(1, math.isqrt(k // modules))
    side = min((low, low + 1), key=lambda p: abs(modules * p * p - k))
    return side, modules * side * side


def bergson_hooks(
    model: nn.Module, tokenized: TokenizedPool, k: int | None, *, target: str
) -> Compute:
    """bergson's collector, set up as its `build` command does, with the rows kept in memory.

    target: "per_module" projects both sides of each LoRA matrix's gradient, to p x p numbers
        (`module_side`); "global" adds a dense projection of each, k numbers in all.
    """
    import_bergson()
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from bergson.data import allocate_batches
    from bergson.utils.worker_utils import extract_peft_target_modules
    from datasets import Dataset

    copied = private_copy(model)
    modules = extract_peft_target_modules(copied)
    # As in its `setup_model_and_peft`: hooks need gradients of activations, not of parameters.
    copied.requires_grad_(False)
    copied.get_input_embeddings().requires_grad_(True)
    side = k if k is None or target == "global" else module_side(model, k)[0]
    processor = GradientProcessor(projection_dim=side, projection_target=target)
    sequences = tokenized.sequences
    data = Dataset.from_dict(
        {
            "input_ids": [response.input_ids for response in sequences],
            "labels": [scored_labels(response) for response in sequences],
        }
    )
    lengths = [len(response.input_ids) for response in sequences]
    batches = allocate_batches(lengths, max(TOKENS_A_BATCH, max(lengths)))

    def compute() -> Tensor:
        with tempfile.TemporaryDirectory() as folder, quiet():
            config = IndexConfig(run_path=f"{folder}/run", token_batch_size=TOKENS_A_BATCH)
            config.partial_run_path.mkdir()  # a count of tokens is written there at the end
            collector = InMemoryCollector(
                model=copied.base_model,
                data=data,
                cfg=config,
                processor=processor,
                target_modules=modules,
            )
            CollectorComputer(
                copied, data, collector=collector, batches=batches, cfg=config
            ).run_with_collector_hooks()
        # It differentiates the loss, which is -log π.
        return -torch.cat(list(collector.gradients.values()), dim=1)

    return compute


def dattri_logra(model: nn.Module, tokenized: TokenizedPool, k: int | None) -> Compute:
    """dattri's LoGra: the hooks and compressors that its `LoGraAttributor` makes for `cache`.

    Each LoRA matrix's gradient is projected on both sides by normal numbers, to p x p
    (`module_side`); with k = None on neither side.
    """
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    copied = private_copy(model)
    layers = [name.removesuffix(".weight") for name in trainable(copied)]
    identity = {"device": "cpu", "proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}
    side = None if k is None else module_side(model, k)[0]
    sides = identity if side is None else {**identity, "proj_dim": side, "proj_type": "normal"}
    plan = plan_batches(tokenized, dimension(model))
    compressors = setup_model_compressors(
        copied,
        layers,
        sparsifier_kwargs=sides,
        projector_kwargs=identity,
        sample_inputs={"input_ids": collate(tokenized, plan[-1])[0]},
        device="cpu",
    )
    manager = HookManager(copied, layers)
    manager.set_compressors(compressors)

    def compute() -> Tensor:
        rows = RowsInOrder(len(tokenized.sequences))
        # It compiles its compressor again for each layer and shape, which takes far longer than
        # running it.
        with torch.compiler.set_stance("force_eager"):
            for batch in plan:
                ids, labels = collate(tokenized, batch)
                logp = log_likelihood(copied(input_ids=ids, use_cache=False).logits, labels)
                # Its rows are gradients of the mean over the batch, so they are multiplied by the
                # batch size.
                (logp / len(batch)).backward()
                rows.put(batch, torch.cat(manager.get_compressed_grads(), dim=1))
        return rows.result()

    return compute
