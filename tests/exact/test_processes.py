"""Identity 9: several processes train the model that one process trains."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from decausal.data.stream import Collator, Noising, TrainingStream
from decausal.diffusion.layout import Layout
from decausal.training.losses import Supervision, install_training_forward
from decausal.training.run_directory import checkpoints
from tests.runs import adapted, assert_same, call, run, save_source, teacher_of, uneven_rows, weights, write_text

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


def _compare_sharded_with_whole(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    (sharded, mask_token_id), (whole, _) = adapted("qwen3"), adapted("qwen3")
    stream = TrainingStream(uneven_rows(), 8, seed=0, shift=1, noising=Noising(2, complementary=True))
    batch = Collator(mask_token_id, 1)([stream[0], stream[1]])
    batch["teacher_states"] = teacher_of("qwen3").states(
        batch["clean_ids"], batch["teacher_index"], (0, 1, 2), batch["document_ids"], batch["position_ids"]
    )
    supervision = Supervision(Layout("bidirectional"), mask_token_id, papl=1.0, aligned_layers=(0, 1, 2))
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (sharded, whole):
        install_training_forward(model, supervision)
        sums = model(training_batch=batch, terms=("tokens", "alignment"))
        (sums["tokens"] + 10 * sums["alignment"]).backward()
    for (name, parameter), expected in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert parameter.grad.to_local().numel() < expected.numel(), name
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, atol=1e-4, rtol=1e-4, msg=name)
    dist.destroy_process_group()


def test_head_and_losses_are_right_where_their_weights_are_sharded(tmp_path: Path) -> None:
    """FSDP2 gathers a module's weights for its own forward only, and the tied head is used inside of it."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    arguments = str(tmp_path / "rendezvous")
    processes = [fork.Process(target=_compare_sharded_with_whole, args=(rank, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
