"""Identity 9: how a global batch is cut into micro-batches changes neither its loss nor its gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from decausal.data.stream import Noising
from decausal.diffusion.layout import Layout
from decausal.models.backbone import logits
from decausal.training.schedule import WeightSchedule
from decausal.training.trainer import ConversionTrainer
from tests.runs import assert_same, logged, make_trainer, state, uneven_rows

GLOBAL_BATCH = 8
BLOCKS = Layout("block", 5)
ALIGNED = {"alignment": WeightSchedule(10.0, "constant", None, 2)}


def trained(directory: Path, micro_batch: int, dtype: torch.dtype, **options: Any) -> ConversionTrainer:
    trainer = make_trainer(
        directory,
        uneven_rows(),
        dtype=dtype,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=GLOBAL_BATCH // micro_batch,
        max_steps=2,
        learning_rate=0.02,
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weighting": "inverse_t"},
        {"shift": 0, "supervision": {"papl": 1.0}},
        {"supervision": ALIGNED},
        {"weighting": "inverse_t", "noising": Noising(2, complementary=True), "supervision": ALIGNED},
        {"aligned_positions": "visible", "supervision": ALIGNED},
        {"layout": BLOCKS, "shift": 0, "weighting": "inverse_t", "noising": Noising(2, block_size=5)},
        {"layout": BLOCKS, "noising": Noising(2, complementary=True, block_size=5), "supervision": ALIGNED},
        {"layout": BLOCKS, "shift": 0, "aligned_positions": "visible", "supervision": ALIGNED},
    ],
    ids=["plain", "inverse_t", "papl", "aligned", "two_views", "visible", "bd3lm", "fast_dllm", "blocks_visible"],
)
def test_eight_micro_batches_of_one_equal_one_batch_of_eight(tmp_path, options):
    assert_equal(trained(tmp_path, 1, torch.float64, **options), trained(tmp_path, 8, torch.float64, **options), 1e-13)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_they_do_in_fp32_up_to_rounding(tmp_path, micro_batch):
    options = {"noising": Noising(2, complementary=True), "supervision": ALIGNED}
    parts, whole = (trained(tmp_path, size, torch.float32, **options) for size in (micro_batch, 8))
    assert_equal(parts, whole, 1e-6)


def assert_equal(parts: ConversionTrainer, whole: ConversionTrainer, atol: float) -> None:
    assert_same(state(parts.model), state(whole.model), atol=atol)
    for name in ("loss", "token_loss"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), abs=2e-6)


def test_the_loss_is_the_mean_over_the_targets_of_the_whole_batch_not_a_mean_of_means(tmp_path):
    trainer = trained(tmp_path, 1, torch.float64)
    start = make_trainer(tmp_path, uneven_rows(), dtype=torch.float64)
    nll, means = [], []
    for position in range(GLOBAL_BATCH):
        item = trainer.train_dataset[position]
        batch = trainer.data_collator([item])
        document_ids, position_ids = batch.get("document_ids"), batch.get("position_ids")
        scores = logits(
            start.model,
            batch["noised_ids"],
            Layout("bidirectional"),
            document_ids=document_ids,
            position_ids=position_ids,
        )
        scores[..., start.supervision.mask_token_id] = -torch.inf
        is_target = item["is_masked"][0]
        predicted = torch.roll(scores[0], 1, dims=0)[is_target].log_softmax(-1)
        row = -predicted.gather(1, item["clean_ids"][is_target][:, None])[:, 0]
        nll.append(row)
        means.append(row.mean())
    numbers_of_targets = [len(row) for row in nll]
    assert max(numbers_of_targets) > 5 * min(numbers_of_targets)
    expected = torch.cat(nll).mean().item()
    assert abs(torch.stack(means).nanmean().item() - expected) > 1e-3
    assert logged(trainer, "token_loss")[0] == pytest.approx(expected, abs=2e-6)


def test_the_inverse_t_loss_is_a_mean_over_all_predictable_tokens(tmp_path):
    trainer = trained(tmp_path, 2, torch.float64, weighting="inverse_t")
    items = [trainer.train_dataset[position] for position in range(GLOBAL_BATCH)]
    batch = trainer.data_collator(items)
    assert batch["counts"]["tokens"] == sum(item["is_predictable"].sum() for item in items)
    assert batch["target_weight"].shape == batch["target_ids"].shape
    level = torch.stack([item["level"] for item in items]).flatten()
    states = batch["target_index"] + 1  # shift 1
    torch.testing.assert_close(batch["target_weight"], 1 / level[states])
