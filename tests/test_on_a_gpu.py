"""What holds on a CPU holds on a GPU: whole conversions, steps that the host never waits in, decoding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.settings import SamplerSettings
from decausal.training.trainer import ConversionTrainer
from tests.exact.test_on_policy_runs import ON_POLICY
from tests.runs import TRAINING, assert_same, run, save_source, weights, write_text
from tests.sampling.block_decoding import block_facts, job_of, sharp_model
from tests.sampling.denoising import in_order

DEVICE = "cuda"
BLOCKS = {"layout": "block", "block_size": 4, "shift": 0, "noise_per": "block"}
ALIGNED = {"align_weight": 10.0, "views": 2, "complementary_masks": True}
DISTILLED = BLOCKS | {"kl_weight": 1.0, "causal_kl_weight": 0.5}
PLAIN_SGD = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def _whole_fp32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source(tmp_path / "model", head_dim=16)  # narrower heads are too narrow for FlexAttention


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl")


@pytest.mark.parametrize("options", [ALIGNED, DISTILLED], ids=["aligned", "distilled"])
def test_a_conversion_trains_what_it_trains_on_a_cpu(
    options: dict[str, Any], source: Path, text: Path, tmp_path: Path
) -> None:
    for use_cpu in (True, False):
        run(source, text, tmp_path / f"cpu-{use_cpu}", use_cpu=use_cpu, **PLAIN_SGD, **options)
    assert_same(weights(tmp_path / "cpu-False"), weights(tmp_path / "cpu-True"), atol=1e-5)


@pytest.mark.parametrize("options", [ALIGNED, BLOCKS], ids=["aligned", "blocks"])
def test_flex_attention_trains_what_dense_masks_train(
    options: dict[str, Any], source: Path, text: Path, tmp_path: Path
) -> None:
    for kind in ("sdpa", "flex_attention"):
        run(source, text, tmp_path / kind, use_cpu=False, attn_implementation=kind, **PLAIN_SGD, **options)
    assert_same(weights(tmp_path / "flex_attention"), weights(tmp_path / "sdpa"), atol=1e-5)


def test_rollouts_in_bf16_train_fp32_weights(source: Path, text: Path, tmp_path: Path) -> None:
    conversion = run(source, text, tmp_path / "out", use_cpu=False, bf16=True, **ON_POLICY)
    losses = [entry["loss"] for entry in conversion.history if "loss" in entry]
    assert len(losses) == TRAINING["max_steps"]
    assert all(math.isfinite(loss) for loss in losses)
    assert {weight.dtype for weight in conversion.model.parameters()} == {torch.float32}
    before, after = weights(source), weights(tmp_path / "out")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("options", [ALIGNED, DISTILLED], ids=["aligned", "distilled"])
def test_the_host_never_waits_inside_a_step(
    options: dict[str, Any], source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rolling out tells the host what was kept; all other steps run ahead of the device until a log line."""
    compute_loss = ConversionTrainer.compute_loss
    num_watched = 0

    def watched(self: ConversionTrainer, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal num_watched
        if self.state.global_step == 0:  # what is made once may wait
            return compute_loss(self, *args, **kwargs)
        num_watched += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = compute_loss(self, *args, **kwargs)
            loss.backward(retain_graph=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return loss

    monkeypatch.setattr(ConversionTrainer, "compute_loss", watched)
    run(source, text, tmp_path / "out", use_cpu=False, **options)
    assert num_watched == TRAINING["max_steps"] - 1


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_are_decoded_as_on_a_cpu(shift: int) -> None:
    schedules = ({"num_steps": 2}, {"threshold": 0.5}, {"num_steps": 3, "temperature": 1.0, "top_k": 5})
    rows = [
        job_of([7, 5, 9, 11, 4][: 1 + index], SamplerSettings(max_new_tokens=14, **schedule), seed=index)
        for index, schedule in enumerate(schedules)
    ]
    written = []
    for device in (DEVICE, "cpu"):
        engine = BlockEngine(sharp_model().to(device), block_facts(4, shift), max_rows=2)
        written.append(in_order(engine, rows))
    assert written[0] == written[1]
