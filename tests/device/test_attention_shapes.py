"""cuDNN's attention plans each exact shape for a second: few shapes may ask for that, however many passes run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from counting import AttentionShapes

from decausal.diffusion.layout import Layout
from decausal.models.attention_plans import MOST_PLANS, SHORTEST
from decausal.models.backbone import body_forward
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.blocks.speculative import SpeculativeEngine
from decausal.sampling.jobs import Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from tests.families import FAMILIES
from tests.sampling.block_decoding import block_facts, job_of, sharp_model
from tests.sampling.denoising import in_order
from tests.sampling.tiny_models import converted

NUM_PASSES = 100


@pytest.fixture(autouse=True)
def _with_cudnn() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("block_size", [1, 4])
def test_decoding_and_rollouts_plan_no_attention(block_size: int) -> None:
    engine = BlockEngine(sharp_model(), block_facts(block_size), max_rows=3)
    settings = SamplerSettings(max_new_tokens=20, num_steps=2)
    with AttentionShapes() as seen:
        in_order(engine, [job_of([5] * (1 + seed % 9), settings, seed) for seed in range(32)])
    assert seen.num_calls > NUM_PASSES * engine.model.config.num_hidden_layers
    assert not seen.planned
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_verified_decoding_plans_no_attention() -> None:
    engine = SpeculativeEngine(converted(), max_rows=2, max_length=40)
    settings = SamplerSettings(max_new_tokens=20, speculative=True)
    with AttentionShapes() as seen:
        list(run(engine, [Job(Row(([5] * (1 + seed), []), (20,), "row"), settings, seed) for seed in range(4)]))
    assert seen.num_calls > 0
    assert not seen.planned


@pytest.mark.parametrize("is_training", [True, False])
def test_rows_of_many_lengths_plan_few(is_training: bool) -> None:
    """Block training with uneven documents, and whole rows that are denoised or measured."""
    model = FAMILIES["qwen3"](max_position_embeddings=2048).train(is_training)
    lengths = range(SHORTEST, SHORTEST + NUM_PASSES)

    def forward(length: int) -> None:
        ids = torch.zeros(1, length, dtype=torch.long)
        extra: dict[str, Any] = {}
        if is_training:
            extra = {"document_ids": ids, "position_ids": torch.arange(length)[None], "stream_ids": ids}
        body_forward(model, ids, Layout("block", 4) if is_training else Layout("bidirectional"), **extra)

    with torch.no_grad(), AttentionShapes() as seen:
        for length in lengths:
            forward(length)
    assert seen.num_calls == NUM_PASSES * model.config.num_hidden_layers
    assert 0 < len(seen.planned) <= MOST_PLANS


def test_rows_of_one_shape_keep_their_plan() -> None:
    model = FAMILIES["qwen3"](max_position_embeddings=2048).train()
    for _ in range(2 * MOST_PLANS):
        with torch.no_grad(), AttentionShapes() as seen:
            body_forward(model, torch.zeros(1, SHORTEST, dtype=torch.long), Layout("bidirectional"))
        assert len(seen.planned) == 1
