"""A step never looks at a number and never mixes devices: on `meta` either is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counting import OneDevice, moved

from decausal.diffusion.layout import Layout, future_order
from decausal.models.row_attention import RowAttention
from tests.device.steps import STEPS, batches_of, prepared, step, take_to
from tests.runs import save_source, write_text

META = torch.device("meta")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.mark.parametrize("kind", STEPS)
def test_a_training_step_is_computed_on_one_device_alone(kind: str, source: Path, text: Path, tmp_path: Path) -> None:
    trainer = prepared(STEPS[kind], source, text, tmp_path / "out")
    batches = batches_of(trainer)
    take_to(trainer, META)
    for form, batch in batches.items():
        batch = moved(batch, META)
        step(trainer, batch)  # what is made once may be copied
        with OneDevice(META) as seen:
            step(trainer, batch)
        assert seen.operators.total() > 0, form
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in trained)


@pytest.mark.parametrize("fraction", [0.25, None])
def test_a_mask_function_is_made_on_one_device_alone(fraction: float | None) -> None:
    """What FlexAttention asks for each pair, also while attention is annealed, anew in every step."""
    ids = torch.zeros(2, 16, dtype=torch.long, device=META)
    future = None if fraction is None else (future_order(16, 0, META), fraction)
    place = torch.arange(16, device=META)
    with OneDevice(META):
        rows = RowAttention(Layout("bidirectional"), ids, ids, None, future)
        rows._mask_function(None)(ids[0, :1], ids[0, :1], place[:, None], place)
