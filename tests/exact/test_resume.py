"""Identity 9: a run that was stopped, in whatever way, and resumed has the weights of one that never was."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from decausal.cli import main
from decausal.errors import UserError
from decausal.training.run_directory import STAGING, checkpoints, is_whole
from tests.families import NO_DROPOUT
from tests.runs import assert_same, call_in_a_copy, run, save_source, weights, write_text

DROPOUT = dict.fromkeys(NO_DROPOUT, 0.1)
NUM_STEPS = 6
NUM_LONG = 20  # so many that a run is still going when it is seen to have begun


@pytest.fixture(autouse=True)
def _one_thread():
    """Bit for bit needs the same sums in the same order, in this process and in those it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StoppedError(Exception):
    pass


class StopAt(TrainerCallback):
    """Ends the run as an exception would, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise StoppedError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source(tmp_path / "model", "gpt2", **DROPOUT)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.jsonl")


OPTIONS = {
    "dropout": {},
    "aligned": {"align_weight": 10.0, "align_schedule": "cosine", "views": 2, "complementary_masks": True},
    "stopped_alignment": {"align_weight": 10.0, "align_stop_step": 4},
    "annealed": {"anneal_steps": 5, "weighting": "inverse_t"},
    "mask_row": {"freeze_embeddings": True},
    "lora": {"lora_r": 4, "lora_dropout": 0.1, "align_weight": 10.0},
    "accumulated": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "papl": 1.0},
    "bf16": {"bf16": True, "align_weight": 1.0},
    "checkpointed": {"gradient_checkpointing": True},
    "bd3lm": {
        **{"layout": "block", "block_size": 4, "shift": 0, "noise_per": "block", "weighting": "inverse_t"},
        **{"align_weight": 1.0, "align_start_step": 2, "token_stop_step": 0.9},
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, source, text, options):
    options = {"max_steps": NUM_STEPS, "weight_decay": 0.01} | options
    run(source, text, tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        run(source, text, tmp_path / "stopped", callbacks=[StopAt(5)], **options)
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["checkpoint-2", "checkpoint-4"]
    run(source, text, tmp_path / "stopped", resume_from_checkpoint="true", **options)
    assert_same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_dropout_makes_the_random_state_matter(tmp_path, source, text):
    """Without it the tests above would not notice a random state that was not restored."""
    first = run(source, text, tmp_path / "a", save_steps=100)
    other = run(save_source(tmp_path / "dry", "gpt2"), text, tmp_path / "b", save_steps=100)
    assert first.history[0]["token_loss"] != other.history[0]["token_loss"]


def test_a_run_stopped_before_its_first_checkpoint_starts_from_the_beginning(tmp_path, source, text, caplog):
    run(source, text, tmp_path / "whole", max_steps=3)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "run.yaml").write_text("max_steps: 3\n")  # what SIGKILL leaves
    run(source, text, tmp_path / "stopped", max_steps=3, resume_from_checkpoint="true")
    assert "from the beginning" in caplog.text
    assert_same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_a_finished_run_resumed_is_the_same_run(tmp_path, source, text):
    run(source, text, tmp_path / "out")
    before = weights(tmp_path / "out")
    run(source, text, tmp_path / "out", resume_from_checkpoint="true")
    assert_same(weights(tmp_path / "out"), before)


def test_logged_means_are_the_same_after_resuming(tmp_path, source, text):
    options = {"align_weight": 1.0, "max_steps": NUM_STEPS}
    whole = run(source, text, tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        run(source, text, tmp_path / "stopped", callbacks=[StopAt(5)], **options)
    resumed = run(source, text, tmp_path / "stopped", resume_from_checkpoint="true", **options)
    names = ("step", "loss", "token_loss", "alignment_loss", "epoch", "learning_rate")
    kept = [[{n: entry[n] for n in names} for entry in run.history if "loss" in entry] for run in (whole, resumed)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == NUM_STEPS


def _train(source: Path, text: Path, output_dir: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    run(source, text, output_dir, max_steps=NUM_STEPS, save_steps=1, resume_from_checkpoint="true")


def test_killed_at_random_moments_and_resumed_each_time_it_ends_with_the_same_weights(tmp_path, source, text):
    started = time.monotonic()
    run(source, text, tmp_path / "whole", max_steps=NUM_STEPS, save_steps=1)
    duration = time.monotonic() - started
    delays = random.Random(0)
    fork = multiprocessing.get_context("fork")
    num_killed = 0
    for attempt in range(60):
        process = fork.Process(target=_train, args=(source, text, tmp_path / "killed"))
        process.start()
        # The first tries die early; then they are given longer, so that the run ends in the end.
        process.join(delays.uniform(0.05, 0.3 if attempt < 4 else 1 + 0.2 * attempt) * duration)
        if not process.is_alive():
            break
        os.kill(process.pid, random.Random(attempt).choice([signal.SIGKILL, signal.SIGTERM]))
        process.join()
        num_killed += 1
    assert process.exitcode == 0
    assert num_killed >= 3
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert not (tmp_path / "killed" / STAGING).exists()


def test_the_command_line_resumes_what_a_signal_ended(tmp_path, source, text):
    arguments = [
        "convert",
        source,
        "--recipe",
        "repr-align",
        "--data",
        text,
        "--max_steps",
        NUM_LONG,
        "--max_length",
        24,
    ]
    arguments += ["--save_steps", 1, "--per_device_train_batch_size", 2, "--save_dtype", "float32", "--use_cpu", "true"]
    arguments = [str(argument) for argument in (*arguments, "--resume_from_checkpoint", "true", "--output_dir")]
    output_dir = tmp_path / "out"
    process = call_in_a_copy(*arguments, output_dir)
    while not checkpoints(output_dir) and process.is_alive():
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert 0 < len(checkpoints(output_dir)) < NUM_LONG
    assert main([*arguments, str(output_dir)]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert_same(weights(output_dir), weights(tmp_path / "whole"))


# Half-written checkpoints


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "no weights": lambda checkpoint: (checkpoint / "model.safetensors").unlink(),
    "weights cut short": lambda checkpoint: _cut_short(checkpoint / "model.safetensors"),
    "no optimizer": lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
    "no random state": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
    "no trainer state": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "no seal": lambda checkpoint: (checkpoint / "checkpoint.json").unlink(),
    "seal cut short": lambda checkpoint: _cut_short(checkpoint / "checkpoint.json"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    source = save_source(root / "model", "gpt2")
    run(source, write_text(root / "text.jsonl"), root / "out")
    return root / "out"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_never_taken_for_whole(tmp_path, finished, damage):
    output_dir = shutil.copytree(finished, tmp_path / "out")
    assert [path.name for path in checkpoints(output_dir)] == ["checkpoint-2", "checkpoint-4"]
    damage(output_dir / "checkpoint-4")
    assert [path.name for path in checkpoints(output_dir)] == ["checkpoint-2"]


def test_what_a_kill_left_in_the_staging_directory_is_no_checkpoint_and_goes(tmp_path, source, text):
    run(source, text, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(source, text, tmp_path / "out", callbacks=[StopAt(3)])
    half_written = tmp_path / "out" / STAGING / "checkpoint-3"
    shutil.copytree(tmp_path / "out" / "checkpoint-2", half_written)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    run(source, text, tmp_path / "out", resume_from_checkpoint="true")
    assert not half_written.exists()
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_damaged_last_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, source, text):
    run(source, text, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(source, text, tmp_path / "out", callbacks=[StopAt(3)], save_steps=1)
    _cut_short(tmp_path / "out" / "checkpoint-3" / "optimizer.pt")
    run(source, text, tmp_path / "out", save_steps=1, resume_from_checkpoint="true")
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert is_whole(tmp_path / "out" / "checkpoint-3")


def test_naming_a_damaged_checkpoint_is_refused(tmp_path, source, text, finished):
    output_dir = shutil.copytree(finished, tmp_path / "out")
    _cut_short(output_dir / "checkpoint-2" / "model.safetensors")
    with pytest.raises(UserError, match="checkpoint-2 is not a checkpoint to resume from"):
        run(source, text, output_dir, resume_from_checkpoint=str(output_dir / "checkpoint-2"))


def test_a_checkpoint_of_weights_alone_is_not_resumed(tmp_path, source, text):
    run(source, text, tmp_path / "out", save_only_model=True)
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").exists()
    assert not checkpoints(tmp_path / "out")


def test_a_named_checkpoint_is_resumed_into_another_directory(tmp_path, source, text):
    run(source, text, tmp_path / "first")
    checkpoint = tmp_path / "first" / "checkpoint-2"
    run(source, text, tmp_path / "second", resume_from_checkpoint=str(checkpoint))
    assert_same(weights(tmp_path / "second"), weights(tmp_path / "first"))
    assert json.loads((tmp_path / "second" / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_resuming_with_other_settings_is_refused(tmp_path, source, text):
    run(source, text, tmp_path / "out")
    with pytest.raises(UserError, match=r"--lora_r 4: .*checkpoint-4 was trained with 0"):
        run(source, text, tmp_path / "out", resume_from_checkpoint="true", lora_r=4)
