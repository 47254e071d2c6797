"""The teacher reads clean rows once per batch, keeps what is asked for, and goes when it is no longer needed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from safetensors import safe_open
from transformers import TrainerCallback

from decausal.data.stream import Noising
from decausal.models.backbone import decoder_layers, head_of
from decausal.training.run_directory import checkpoints
from decausal.training.schedule import WeightSchedule
from tests.families import FAMILIES
from tests.runs import logged, make_trainer, run, save_source, teacher_of, uneven_rows, write_text


def count_calls(module: torch.nn.Module) -> list[int]:
    """Grows by one with each of the module's forwards."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def aligned_trainer(tmp_path, *, stop_step=None, shape="constant", **options):
    schedule = WeightSchedule(10.0, shape, stop_step, 4)
    return make_trainer(tmp_path, uneven_rows(), supervision={"alignment": schedule}, **options)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_one_teacher_pass_serves_all_views_of_a_batch_and_never_runs_its_head(tmp_path, views):
    trainer = aligned_trainer(tmp_path, noising=Noising(views), gradient_accumulation_steps=2)
    teacher = trainer.teacher.model
    passes, head_passes = count_calls(teacher.base_model), count_calls(teacher.get_output_embeddings())
    student_passes = count_calls(trainer.model.base_model)
    trainer.train()
    assert len(passes) == len(student_passes) == 4 * 2
    assert not head_passes


def test_after_the_stop_the_teacher_is_gone_from_memory_and_runs_no_more(tmp_path):
    trainer = aligned_trainer(tmp_path, stop_step=2)
    passes = count_calls(trainer.teacher.model.base_model)
    gone = weakref.ref(trainer.teacher.model)
    alive: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gc.collect()
            alive.append(gone() is not None)

    trainer.add_callback(Watch())
    trainer.train()
    assert alive == [True, True, False, False]
    assert len(passes) == 2
    assert len(logged(trainer, "alignment_loss")) == 2
    assert len(logged(trainer, "token_loss")) == 4


@pytest.mark.parametrize(("shape", "expected"), [("linear", [10, 7.5, 5, 2.5]), ("constant", [10] * 4)])
def test_the_loss_is_the_token_loss_plus_the_scheduled_weight_times_the_alignment(tmp_path, shape, expected):
    trainer = aligned_trainer(tmp_path, shape=shape)
    trainer.train()
    losses = zip(*(logged(trainer, name) for name in ("loss", "token_loss", "alignment_loss")), strict=True)
    assert [(loss - tokens) / alignment for loss, tokens, alignment in losses] == pytest.approx(expected, rel=1e-4)


def test_its_weights_never_change_and_take_no_gradient(tmp_path):
    trainer = aligned_trainer(tmp_path)
    teacher = trainer.teacher
    trainer.train()
    source = FAMILIES["qwen3"]()
    for name, parameter in teacher.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, source.get_parameter(name)), name


def test_it_keeps_only_the_rows_and_layers_that_are_asked_for():
    teacher = teacher_of("llama")
    index = torch.tensor([3, 4, 20])
    states = teacher.states(torch.arange(24).reshape(2, 12), index, (1, 2))
    assert [state.shape for state in states] == [(3, 32), (3, 32)]
    assert all(state.untyped_storage().nbytes() == 3 * 32 * 4 for state in states)
    assert not any(module._forward_pre_hooks for module in teacher.model.modules())


@pytest.mark.parametrize(("layers", "num_run"), [((0,), 0), ((0, 1), 1), ((1,), 1), ((2, 0), 2)])
def test_it_runs_no_layer_beyond_the_last_that_is_asked_for(layers, num_run):
    teacher, index, ids = teacher_of("llama"), torch.tensor([3, 4, 20]), torch.arange(24).reshape(2, 12)
    whole = teacher.states(ids, index, (0, 1, 2))
    runs = [count_calls(layer) for layer in decoder_layers(teacher.model)]
    states = teacher.states(ids, index, layers)
    assert sum(map(len, runs)) == num_run
    assert all(torch.equal(state, whole[layer]) for state, layer in zip(states, layers, strict=True))


def tensors(path) -> dict[str, list[int]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("options", [{}, {"freeze_embeddings": True}], ids=["all", "frozen"])
def test_checkpoints_hold_the_sources_tensors_and_no_other(tmp_path, options):
    source = save_source(tmp_path / "model", "llama", vocab_size=300)  # spare rows: no new shape for the mask token
    expected = tensors(source / "model.safetensors")
    run(source, write_text(tmp_path / "text.jsonl"), tmp_path / "out", align_weight=1.0, **options)
    directories = [tmp_path / "out", *checkpoints(tmp_path / "out")]
    assert len(directories) == 3
    for directory in directories:
        assert tensors(directory / "model.safetensors") == expected
        assert not [path for path in directory.iterdir() if "teacher" in path.name]


def test_the_optimizer_holds_nothing_of_the_teacher_or_of_frozen_embeddings(tmp_path):
    source = save_source(tmp_path / "model", "llama")
    run(source, write_text(tmp_path / "text.jsonl"), tmp_path / "out", align_weight=1.0, freeze_embeddings=True)
    optimizer = torch.load(tmp_path / "out" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    model = FAMILIES["llama"]()
    frozen = {id(model.get_input_embeddings().weight), id(head_of(model).weight)}
    num_trained = sum(id(parameter) not in frozen for parameter in model.parameters()) + 1  # and the mask row
    assert len(optimizer["state"]) == num_trained
