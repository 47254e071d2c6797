"""The training steps of real conversions, taken to a device: all that a run prepares, up to its first step."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decausal.training.on_policy import POSITIONS
from decausal.training.trainer import ConversionTrainer
from tests.exact.test_on_policy_runs import ON_POLICY
from tests.runs import run

BLOCKS = {"layout": "block", "block_size": 4, "shift": 0, "noise_per": "block"}
ALIGNED = {"align_weight": 1.0}
DRAFTS = {"layout": "block", "block_size": 3, "causal_context": True, "shift": 1, "noise": "all", "kl_weight": 1.0}
GATED = {"weights": "gated", "lora_r": 2, "save_dtype": "source"}
CAUSAL_KL = {"causal_kl_weight": 1.0, "causal_context": True}

STEPS: dict[str, dict[str, Any]] = {
    "causal": {"layout": "causal"},
    "plain": {},
    "aligned": ALIGNED,
    "aligned, two views": ALIGNED | {"views": 2, "complementary_masks": True},
    "aligned, adapters": ALIGNED | {"lora_r": 2},
    "annealed, frozen, planned": {"anneal_steps": 100, "freeze_embeddings": True, "papl": 1.0},
    "block": BLOCKS | {"weighting": "inverse_t"},
    "block, every loss": BLOCKS | ALIGNED | {"kl_weight": 1.0, "tv_weight": 1.0} | CAUSAL_KL,
    "block, KL of the top 5": BLOCKS | {"kl_weight": 1.0, "kl_top_k": 5, "kl_tail_bucket": True},
    "rollout states": ON_POLICY,
    "drafts, gated": DRAFTS | GATED | {"token_weight": 0.0, "align_distance": "l2"} | ALIGNED,
    "drafts, shared": DRAFTS | {"clean_weight": 1.0, "clean_balanced": True, "causal_groups": True, "anchors": 4},
}
"""Every kind of step that the recipes take, and how to ask for it."""


class _Prepared(Exception):  # noqa: N818
    """A run is prepared as far as its first step."""


def prepared(options: dict[str, Any], source: Path, data: Path, output_dir: Path) -> ConversionTrainer:
    """Everything of a run but its steps."""
    found: list[ConversionTrainer] = []

    def train(trainer: ConversionTrainer, **_: Any) -> None:
        found.append(trainer)
        raise _Prepared

    with pytest.MonkeyPatch.context() as patch, suppress(_Prepared):
        patch.setattr(ConversionTrainer, "train", train)
        run(source, data, output_dir, **options)
    return found[0]


def batches_of(trainer: ConversionTrainer) -> dict[str, dict[str, Any]]:
    """The first batch on the CPU, packed as it comes and as rows of one document each; rollouts are made."""
    items = [trainer.train_dataset[position] for position in range(trainer.args.per_device_train_batch_size)]
    if POSITIONS in items[0]:
        return {"rollouts": trainer._with_rows(trainer.data_collator(items))}
    whole = [item | {"document_ids": torch.zeros_like(item["document_ids"])} for item in items]
    return {"packed": trainer.data_collator(items), "whole": trainer.data_collator(whole)}


def take_to(trainer: ConversionTrainer, device: torch.device) -> None:
    """Moves all models."""
    trainer.model.to(device).train()
    if trainer.teacher is not None:
        trainer.teacher.model.to(device)


def step(trainer: ConversionTrainer, batch: dict[str, Any]) -> Tensor:
    """A forward and a backward pass as the trainer makes them, on a batch that is where the models are."""
    counts = {name: count.to(torch.float32) for name, count in batch["counts"].items()}
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
    loss.backward()
    return loss
