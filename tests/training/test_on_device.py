"""What runs leave to their device, by pretending that it is a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from decausal.data.block_collator import BlockCollator
from decausal.data.stream import TrainingStream
from decausal.devices import choices
from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.row_attention import FLEX
from decausal.training import on_device
from decausal.training.run import precision_on, training_arguments
from decausal.training.settings import ConversionSettings
from decausal.training.teacher import CAUSAL, Teacher
from tests.families import FAMILIES
from tests.runs import uneven_rows

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BLOCKS = {"layout": "block", "block_size": 4, "shift": 0}
WHOLE = {"layout": "bidirectional", "shift": 1}


class OnCuda(TrainingArguments):
    """Arguments of a run on a GPU."""

    @property
    def device(self) -> torch.device:
        _ = super().device  # sets up what else the arguments tell
        return CUDA


class Rows:
    """Rows of one document each."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"document_ids": torch.zeros(8, dtype=torch.long)}


def settings_of(**settings: Any) -> ConversionSettings:
    return ConversionSettings(**settings).with_facts()


def stream_of(rows: Any) -> TrainingStream:
    return TrainingStream(rows, 4, seed=0, shift=1, noising=None)


@pytest.fixture
def flexed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Layout]]:
    """What was made to attend by FlexAttention, which needs a GPU to be tried."""
    found: list[tuple[Any, Layout]] = []

    def use(model: Any, layout: Layout, device: torch.device) -> None:
        assert device == CUDA
        model.config._attn_implementation = FLEX
        found.append((model, layout))

    monkeypatch.setattr(on_device, "use_flex_attention", use)
    return found


@pytest.mark.parametrize(
    ("facts", "rows", "device", "is_flex"),
    [
        (BLOCKS, Rows(), CUDA, True),
        (WHOLE, uneven_rows(), CUDA, True),
        (WHOLE, Rows(), CUDA, False),
        (BLOCKS, uneven_rows(), CPU, False),
    ],
    ids=["blocks", "packed rows", "whole rows", "on a CPU"],
)
def test_packed_and_doubled_rows_are_read_by_flex_attention_on_a_gpu(
    facts: dict[str, Any], rows: Any, device: torch.device, is_flex: bool, flexed: list[Any]
) -> None:
    """The teacher too, which was loaded by itself."""
    student, teacher = FAMILIES["qwen3"](), Teacher(FAMILIES["qwen3"]())
    settings = settings_of(**facts)
    on_device.attend_by_flex(settings, student, teacher, stream_of(rows), device)
    layout = Layout(facts["layout"], facts.get("block_size"), False)
    assert flexed == ([(student, layout), (teacher.model, CAUSAL)] if is_flex else [])


def test_what_the_model_or_the_user_asks_for_stays(flexed: list[Any]) -> None:
    for family, asked in (("gemma2", None), ("qwen3", "sdpa")):
        settings = settings_of(**BLOCKS, attn_implementation=asked)
        on_device.attend_by_flex(settings, FAMILIES[family](), None, stream_of(Rows()), CUDA)
    assert not flexed


def test_a_model_that_does_not_run_under_flex_attention_is_reported_and_trains_by_dense_masks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("--attn_implementation flex_attention: it is too narrow; leave it out")

    monkeypatch.setattr(on_device, "use_flex_attention", refuse)
    model = FAMILIES["qwen3"]()
    on_device.attend_by_flex(settings_of(**BLOCKS), model, None, stream_of(Rows()), CUDA)
    assert model.config._attn_implementation == "sdpa"
    assert "attends by dense masks, which takes more time and memory: it is too narrow\n" in capsys.readouterr().err


def test_a_gpu_that_multiplies_bf16_trains_in_it_unless_a_flag_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert precision_on(CUDA, {}) == {"bf16": True}
    assert precision_on(CUDA, {"bf16": False}) == precision_on(CUDA, {"fp16": True}) == precision_on(CPU, {}) == {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert precision_on(CUDA, {}) == {}


@pytest.mark.parametrize(("is_bf16", "word"), [(True, "bfloat16, on weights"), (False, "an order of magnitude slower")])
def test_the_precision_is_said_in_one_line(
    is_bf16: bool, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decausal.data.reading._SAID", set())
    args = OnCuda(output_dir=str(tmp_path), use_cpu=True, bf16=is_bf16)
    on_device.say_precision(args)
    reported = capsys.readouterr().err
    assert word in reported
    assert reported.count("\n") == 1


def test_the_optimizer_is_fused(tmp_path: Path) -> None:
    assert training_arguments({"output_dir": str(tmp_path)}).optim == "adamw_torch_fused"


@pytest.mark.parametrize(
    ("changes", "is_compiled"),
    [({}, True), ({"max_steps": 2}, False), ({"lora_r": 4}, True), ({"compile_layers": False}, False)],
)
def test_layers_of_long_runs_are_compiled(changes: dict[str, Any], is_compiled: bool, tmp_path: Path) -> None:
    given = {"max_steps": 10**12, **changes}
    args = OnCuda(output_dir=str(tmp_path), use_cpu=True, max_steps=given.pop("max_steps"))
    settings = settings_of(**WHOLE, **given)
    assert on_device.compiles(settings, FAMILIES["qwen3"](), args) is is_compiled


def test_doubled_rows_have_few_lengths_on_a_gpu() -> None:
    lengths = set()
    stream = TrainingStream(uneven_rows(), 16, seed=0, shift=0, noising=None)
    for position in range(16):
        item = stream[position]
        item["is_masked"] = item["is_predictable"][None]
        batch = BlockCollator(267, 0, Layout("block", 4), row_multiple=choices(CUDA).row_multiple)([item])
        lengths.add(batch["student_ids"].shape[1])
    assert lengths == {128}
