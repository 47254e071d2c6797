"""What `plan` says before a run is what the run then needs, by the run's own step with numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import peak_bytes  # of benchmarks/, which tests.device puts on the path

import tests.device  # noqa: F401
from decausal.cli import main
from decausal.config import read_recipe, resolve
from decausal.devices import choices
from decausal.errors import UserError
from decausal.models.architecture import context_length
from decausal.sampling.blocks.engine import BlockEngine
from decausal.sampling.settings import SamplerSettings
from decausal.training.planning.footprint import Footprint, footprint
from decausal.training.planning.plan import plan
from decausal.training.planning.room import needed, refuse_what_does_not_fit, remedy
from decausal.training.planning.step import planned_step
from decausal.training.planning.timing import Measured
from decausal.training.settings import ConversionSettings
from tests.runs import save_source, write_text
from tests.sampling.block_decoding import block_facts, job_of
from tests.sampling.denoising import in_order

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS, LENGTH = 4, 96
CLOSE = 0.15
"""How far a plan may be from a measured run."""
KINDS = [
    "mdm",
    "mdm --bf16 true",
    "mdm --gradient_checkpointing true",
    "mdm --gradient_accumulation_steps 2",
    "diffullama",
    "repr-align --views 2",
    "repr-align --lora_r 4 --bf16 true",
    "bd3lm",
    "opdlm",
    "align-distill",
    "introspective",
    "lossless --lora_r 4",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model", max_position_embeddings=256)


def resolved(source: Path, words: str) -> tuple[ConversionSettings, dict[str, Any]]:
    recipe, *flags = words.split()
    sizes = ["--model_name_or_path", str(source), "--max_length", str(LENGTH)]
    return resolve(ConversionSettings, read_recipe(recipe) | {"per_device_train_batch_size": ROWS}, [*sizes, *flags])


def planned(source: Path, words: str, device: torch.device = CPU) -> Footprint:
    return footprint(planned_step(*resolved(source, words), device))


@pytest.mark.parametrize("words", KINDS)
def test_memory_is_that_of_a_measured_step(source: Path, words: str) -> None:
    found = planned(source, words)
    real = Measured(planned_step(*resolved(source, words), CPU, where=CPU))
    peaks = []
    for terms, _ in real.step.stages():
        for weight in real.step.student.parameters():
            weight.grad = torch.zeros_like(weight) if found.are_gradients_kept and weight.requires_grad else None
        peaks.append(peak_bytes(lambda terms=terms: real.run(terms), CPU))
    of_step = found.answers + found.activations + found.copies + found.working
    assert of_step == pytest.approx(max(peaks), rel=CLOSE)
    real.change_weights()
    state = [value for values in real.optimizer.state.values() for value in values.values()]
    assert found.optimizer == sum(value.nbytes for value in state if value.dim())
    tensors = [*real.step.student.parameters(), *real.step.student.buffers()]
    assert found.weights == sum(tensor.nbytes for tensor in tensors)


def test_operations_are_those_of_the_floor(source: Path) -> None:
    from floors import ModelShape

    step = planned_step(*resolved(source, "mdm"), CPU)
    floor = ModelShape.of(step.student).plain_step(LENGTH, len(step.batch["target_index"]) / (ROWS * LENGTH))
    assert footprint(step).tally.operations == pytest.approx(floor * ROWS * LENGTH, rel=0.01)


def test_parts_make_up_the_peak_and_grow_with_the_batch(source: Path) -> None:
    small, large = (
        planned(source, "repr-align"),
        planned(source, f"repr-align --per_device_train_batch_size {3 * ROWS}"),
    )
    assert small.total == sum(small.parts.values())
    assert large.activations == pytest.approx(3 * small.activations, rel=0.02)
    assert large.weights == small.weights > 0
    assert large.teacher == small.teacher > 0


def test_on_a_gpu_steps_are_in_bf16_and_doubled_rows_need_no_dense_mask(source: Path) -> None:
    of_cpu, of_gpu = planned(source, "bd3lm --bf16 true"), planned(source, "bd3lm", CUDA)
    assert of_gpu.copies == of_cpu.copies > 0
    dense = planned(source, "bd3lm --attn_implementation sdpa", CUDA)
    assert of_gpu.tally.kernels["flex_attention"] > 0
    assert dense.tally.kernels["flex_attention"] == 0


def test_keys_and_values_of_rollouts_are_those_of_the_engine(source: Path) -> None:
    words, rows = "opdlm --rollout_batch_size", 3
    step = planned_step(*resolved(source, f"{words} {rows}"), CPU, where=CPU)
    engine = BlockEngine(step.student, block_facts(4, 0), max_rows=rows, max_length=LENGTH)
    in_order(engine, [job_of([5, 7], SamplerSettings(max_new_tokens=4))])
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in engine._cache.layers)
    assert planned(source, f"{words} {rows}").rollouts == held
    assert planned(source, "bd3lm").rollouts == 0
    many = planned(source, f"{words} 100000")
    assert many.parts["rollouts' keys and values"] == many.rollouts > many.activations


@pytest.mark.parametrize("words", ["mdm", "repr-align", "lossless --lora_r 4"])
def test_the_cheapest_setting_that_fits_is_found(source: Path, words: str) -> None:
    settings, training = resolved(source, words)
    whole = needed(planned(source, words, CUDA), CUDA)
    found = remedy(settings, training, CUDA, whole - 1)
    assert found is not None
    assert found.flags == {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2}
    assert needed(found.found, CUDA) < whole
    assert remedy(settings, training, CUDA, 1e8) is None


def test_checkpointing_and_adapters_come_last(source: Path) -> None:
    settings, training = resolved(source, "mdm --per_device_train_batch_size 1")
    without = needed(planned(source, "mdm --per_device_train_batch_size 1", CUDA), CUDA)
    found = remedy(settings, training, CUDA, without - 1)
    assert found is not None
    assert next(iter(found.flags)) in ("gradient_checkpointing", "lora_r")


def test_a_run_that_would_run_out_is_refused_with_what_fits(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, training = resolved(source, "mdm")
    settings = replace(settings, data="nowhere.txt")  # data are not read
    need = needed(planned(source, "mdm", CUDA), CUDA)
    with pytest.raises(UserError, match="give --per_device_train_batch_size 2 --gradient_accumulation_steps 2, which"):
        refuse_what_does_not_fit(settings, training, CUDA, room=need - 1)
    with pytest.raises(UserError, match="none of the settings that save memory is enough"):
        refuse_what_does_not_fit(settings, training, CUDA, room=1e8)
    refuse_what_does_not_fit(settings, training, CUDA, room=need)
    assert "of GPU memory" in capsys.readouterr().err
    monkeypatch.setattr("decausal.training.planning.room.footprint", None)  # not counted at all
    refuse_what_does_not_fit(settings, training, CPU)
    refuse_what_does_not_fit(settings, training, CUDA, is_sharded=True)


def test_plan_prints_a_table_and_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_text(tmp_path / "text.jsonl")
    words = ["plan", str(source), "--recipe", "mdm", "--max_length", "32", "--use_cpu", "true"]
    assert main([*words, "--data", str(data), "--num_train_epochs", "2", "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] == sum(found["memory_bytes"].values())
    assert found["steps"] > 1
    assert found["hours"] == pytest.approx(found["steps"] * found["seconds_per_step"] / 3600)
    assert main([*words, "--gpu", "h100", "--max_steps", "10"]) == 0
    table = capsys.readouterr().out
    assert "H100" in table
    assert "fits: about" in table


def test_hours_are_not_reported_without_a_length(source: Path) -> None:
    settings, training = resolved(source, "mdm")
    found = plan(settings, training, gpu="l4")
    assert found.hours is None
    assert found.step_seconds is not None


def test_a_run_is_refused_as_convert_would(source: Path) -> None:
    with pytest.raises(UserError, match="is over the model's maximum"):
        plan(*resolved(source, "mdm --max_length 9999"), gpu="l4")
    assert context_length(planned_step(*resolved(source, "mdm"), CPU).student.config) == 256
    assert choices(CUDA).checks_memory > choices(CPU).checks_memory
