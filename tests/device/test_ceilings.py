"""Ceilings at Qwen3-0.6B's shape, two layers of it: operations over the floor, memory per token, kernels per layer.

Attention is computed as CUDA would: by dense masks, and by FlexAttention in blocks of 128.
"""

from __future__ import annotations

import pytest
import torch
from models import build
from paper_steps import KINDS, META, PaperStep, block_pass

from decausal.training.planning.kernels import counted

SHAPE, NUM_LAYERS = "qwen3-0.6b, 2 layers", 2

# Operations over the floor with dense masks and with FlexAttention, at 2 x 1024, and MB per token that the student
# reads, two layers and the loss's chunks of up to 1 GiB together. What was counted, and a little.
CEILINGS = {
    "plain": (1.005, 1.005, 1.48),
    "aligned, 2 views": (1.02, 1.03, 1.34),
    "block": (1.19, 1.05, 0.82),
    "block, KL": (1.19, 1.05, 1.13),
    "block, causal KL": (1.09, 1.03, 1.80),
}
MOST_KERNELS_PER_LAYER = 62
MOST_OTHER_KERNELS = 90


@pytest.mark.parametrize(
    ("kind", "is_flex"),
    [*((kind, False) for kind in CEILINGS), *((kind, True) for kind in ("plain", "block", "block, causal KL"))],
)
def test_a_step_does_little_more_than_its_floor_and_holds_little(kind: str, is_flex: bool) -> None:
    step = PaperStep(KINDS[kind], SHAPE, rows=2, length=1024, is_flex=is_flex)
    tally = step.tally()
    num_tokens = step.batch.get("student_ids", step.batch.get("noised_ids")).numel()
    *over_floor, most_bytes = CEILINGS[kind]
    assert 0.999 <= tally.operations / step.floor() <= over_floor[is_flex]
    assert tally.peak_bytes / num_tokens <= most_bytes * 1e6


def test_four_documents_in_a_row_are_spared_by_flex_attention_alone() -> None:
    ratios = {}
    for is_flex in (False, True):
        step = PaperStep(KINDS["plain"], SHAPE, rows=2, length=1024, documents=4, is_flex=is_flex)
        ratios[is_flex] = step.tally().operations / step.floor()
    assert ratios[True] <= 1.005 < 1.05 < ratios[False]


@pytest.mark.parametrize("num_rows", [1, 32])
def test_a_decoding_pass_starts_few_kernels(num_rows: int) -> None:
    model = build(SHAPE, META, torch.bfloat16)
    tally = counted(block_pass(model, num_rows=num_rows, num_keys=1024))
    assert tally.kernels.total() <= MOST_KERNELS_PER_LAYER * NUM_LAYERS + MOST_OTHER_KERNELS
    masks = sum(tally.kernels[name] for name in ("scalar_tensor", "where"))
    assert masks <= 5, "one mask serves all layers"
