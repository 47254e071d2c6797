"""Identity 9: several processes train the model that one process trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decausal.training.run_directory import checkpoints
from tests.runs import assert_same, call, run, save_source, weights, write_text

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m")  # more on a CPU need MPI
OPTIONS = {
    "max_steps": 4,
    "views": 2,
    "complementary_masks": True,
    "align_weight": 10.0,
    "learning_rate": 1e-3,
    "optim": "sgd",  # hides no error in the gradient's scale
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
    "save_steps": 2,
    "logging_steps": 1,
}


@pytest.mark.parametrize(
    ("launcher", "num_processes"), [(TORCHRUN, 2), (ACCELERATE, 1)], ids=["torchrun", "accelerate"]
)
def test_launched_processes_train_what_one_trains(
    tmp_path: Path, launcher: tuple[str, ...], num_processes: int
) -> None:
    source, text = save_source(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    run(source, text, tmp_path / "one", per_device_train_batch_size=1, gradient_accumulation_steps=4, **OPTIONS)
    flags = [part for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    flags += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4 // num_processes]
    flags += ["--max_length", 24, "--use_cpu", "true", "--save_dtype", "float32", "--output_dir", tmp_path / "launched"]
    ended = call("convert", source, "--recipe", "mdm", "--data", text, *flags, launcher=launcher)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("converted model:") == 1
    assert_same(weights(tmp_path / "launched"), weights(tmp_path / "one"), atol=1e-6)
    assert [path.name for path in checkpoints(tmp_path / "launched")] == ["checkpoint-2", "checkpoint-4"]
    histories = [
        json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        for name in ("one", "launched")
    ]
    for name in ("loss", "token_loss", "alignment_loss"):
        one, launched = ([entry[name] for entry in history] for history in histories)
        assert launched == pytest.approx(one, abs=5e-6)
