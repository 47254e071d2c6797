"""A disk that fills up and a loss that goes wrong cost the steps since the last checkpoint, and no more."""

from __future__ import annotations

import errno
import os
import resource
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from decausal.errors import UserError
from decausal.files import LOG_FILE
from decausal.models.checkpoint import load_converted
from decausal.training.run_directory import RUN_FILE, STAGING, checkpoints
from tests.runs import assert_same, kept_from_others, run, save_source, weights, write_text


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source, text) -> dict[str, torch.Tensor]:
    directory = tmp_path_factory.mktemp("whole") / "out"
    run(source, text, directory)
    return weights(directory)


def test_others_may_read_what_the_umask_lets_them_read(tmp_path, source, text):
    run(source, text, tmp_path / "out")
    assert {path.name for path in checkpoints(tmp_path / "out")} == {"checkpoint-2", "checkpoint-4"}
    assert kept_from_others(tmp_path / "out") == []
    mask = os.umask(0o077)
    try:
        run(source, text, tmp_path / "private", max_steps=1)
    finally:
        os.umask(mask)
    assert not any(path.stat().st_mode & 0o077 for path in (tmp_path / "private").rglob("*"))


def full_from(monkeypatch, name: str, step: int) -> None:
    """Makes one of the savers fail from a step on, as on a full disk."""
    module, _, attribute = name.rpartition(".")
    target = import_module(module)
    real = getattr(target, attribute)

    def writer(*args, **kwargs):
        if f"checkpoint-{step}" in " ".join(map(str, args)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(target, attribute, writer)


@pytest.mark.parametrize(
    "writer", ["torch.save", "decausal.training.convert.write_facts", "decausal.training.checkpointing.seal"]
)
def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_goes_on(
    tmp_path, monkeypatch, source, text, whole, writer
):
    with monkeypatch.context() as patched:
        full_from(patched, writer, 4)
        with pytest.raises(
            UserError, match=r"No space left on device; .*checkpoint-2 is whole.*--resume_from_checkpoint"
        ):
            run(source, text, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-2", LOG_FILE, RUN_FILE]
    run(source, text, tmp_path / "out", resume_from_checkpoint="true")
    assert_same(weights(tmp_path / "out"), whole)


def test_a_disk_full_at_the_first_save_leaves_nothing(tmp_path, monkeypatch, source, text):
    full_from(monkeypatch, "torch.save", 2)
    with pytest.raises(UserError, match="no earlier checkpoint exists"):
        run(source, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class LimitFiles(TrainerCallback):
    """From a step on, the kernel refuses to let any file of this process grow beyond a size."""

    def __init__(self, step: int, largest_file: int) -> None:
        self.step, self.largest_file = step, largest_file

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, hard))


@pytest.fixture
def _files_of_any_size_afterwards():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The weights, written by Rust, have 100 kB, the optimizer's state, written by C++, 200 kB: each fails in its own way.
@pytest.mark.parametrize("largest_file", [50_000, 150_000], ids=["weights", "optimizer"])
@pytest.mark.usefixtures("_files_of_any_size_afterwards")
def test_when_the_kernel_refuses_to_write_the_last_good_checkpoint_goes_on(tmp_path, source, text, whole, largest_file):
    output_dir, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError) as refused:
        run(source, text, output_dir, callbacks=[LimitFiles(2, largest_file)])
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(refused.value).startswith(f"cannot save to {output_dir}: ")
    assert "checkpoint-2 is whole" in str(refused.value)
    assert not (output_dir / STAGING).exists()
    run(source, text, output_dir, resume_from_checkpoint="true")
    assert_same(weights(output_dir), whole)


# Losses that go wrong


class Poison(TrainerCallback):
    """Spoils one number before a step: a weight before the forward, or a gradient after the backward."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == self.step and self.what == "weight":
            with torch.no_grad():
                model.get_input_embeddings().weight.fill_(float("nan"))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == self.step and self.what == "gradient":
            next(model.parameters()).grad.fill_(float("inf"))


def assert_all_finite(output_dir: Path) -> None:
    for checkpoint in checkpoints(output_dir):
        assert all(tensor.isfinite().all() for tensor in weights(checkpoint).values())


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_the_step(tmp_path, source, text, step):
    kept = r".*checkpoint-2" if step >= 2 else "no checkpoint had been saved"
    with pytest.raises(UserError, match=rf"the loss at step {step + 1} is not finite.*{kept}"):
        run(source, text, tmp_path / "out", callbacks=[Poison(step, "weight")])
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"] * (step >= 2)
    assert_all_finite(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_weights_spoiled_by_a_gradient_reach_no_checkpoint(tmp_path, source, text):
    with pytest.raises(UserError, match=r"after step 4 some weights are not finite.*checkpoint-2"):
        run(source, text, tmp_path / "out", callbacks=[Poison(3, "gradient")])
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert_all_finite(tmp_path / "out")


def test_a_learning_rate_far_too_high_is_such_a_run(tmp_path, source, text):
    with pytest.raises(UserError, match="not finite, so training stopped"):
        run(source, text, tmp_path / "out", learning_rate=1e30, save_steps=1)
    assert_all_finite(tmp_path / "out")


def test_on_a_device_a_bad_loss_is_found_at_the_next_log_or_save(tmp_path, source, text, monkeypatch):
    """There the host does not look at each step's loss; made so here by a watch that looks as rarely."""
    from decausal.training import bad_steps

    monkeypatch.setattr(bad_steps, "_reads_at_once", lambda device: False)
    with pytest.raises(UserError, match=r"the loss at step 2 is not finite"):
        run(source, text, tmp_path / "out", callbacks=[Poison(1, "weight")], max_steps=8, logging_steps=4, save_steps=6)
    assert not checkpoints(tmp_path / "out")


# Overwriting


def test_overwriting_starts_anew_and_bad_input_costs_no_earlier_run(tmp_path, source, text, whole):
    run(source, text, tmp_path / "out", seed=3, max_steps=6)
    with pytest.raises(UserError, match="nowhere"):
        run(source, tmp_path / "nowhere.txt", tmp_path / "out", overwrite=True)
    assert load_converted(tmp_path / "out").facts.recipe["seed"] == 3
    run(source, text, tmp_path / "out", overwrite=True)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-4"]
    assert_same(weights(tmp_path / "out"), whole)
