"""Identity 9: several processes train the model that one process trains."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import decausal
from decausal.data.counts import Count
from decausal.data.stream import Collator, Noising, TrainingStream
from decausal.diffusion.layout import Layout
from decausal.models.backbone import decoder_layers
from decausal.training.losses import Supervision, install_training_forward, weighted_loss
from decausal.training.questions import Vocabulary, ask
from decausal.training.run_directory import checkpoints
from decausal.training.sharding import shard_layers
from decausal.training.teacher import AdapterTeacher
from decausal.training.terms import AlignmentTerm, TokenTerm
from tests.exact.launched import run_lines
from tests.exact.test_on_policy_runs import ON_POLICY, WARM
from tests.families import VOCAB_SIZE
from tests.runs import (
    ROOT,
    T,
    adapted,
    assert_same,
    run,
    save_source,
    teacher_of,
    uneven_rows,
    weights,
    write_text,
)

LENGTH = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
NOT_COMPARED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
BLOCKS = {"layout": "block", "block_size": 4, "shift": 0, "noise_per": "block", "weighting": "inverse_t"}
DRAFTS = {
    **{"layout": "block", "block_size": 3, "causal_context": True, "shift": 1, "noise": "all", "anchors": 4},
    **{"weights": "gated", "lora_r": 2, "draft_head": True, "kl_weight": 1.0, "token_weight": 0.0},
    "save_dtype": "source",
}
ALIGNED = {"align_weight": 10.0, "views": 2, "complementary_masks": True}

WORST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_nelbo_per_token", "greater_is_better": True}
ONE_BY_ONE = {"rollout_batch_size": 1, "rollout_threshold": 0.9}


def launch(lines: list[list[object]], folder: Path) -> str:
    """Runs command lines in two processes under torchrun's own agent, and returns what they printed.

    They are copies of this process: new ones would import for longer than they train.
    """
    torch.set_num_threads(1)
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=Std.OUT),
    )
    with own_signals():
        elastic_launch(agent, run_lines)([[str(part) for part in line] for line in lines])
    return "".join(path.read_text() for path in sorted(folder.rglob("stdout.log")))


@contextmanager
def own_signals() -> Iterator[None]:
    """Takes back the handlers of signals that the agent leaves after, which copies of this process would inherit."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def accelerate_variables(configuration: Path) -> dict[str, str]:
    """What `accelerate launch --num_processes 2 --config_file` tells its processes."""
    arguments = ["--num_processes", "2", "--config_file", str(configuration), "script.py"]
    settings, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return prepare_multi_gpu_env(settings)


def line(source: Path, text: Path, output_dir: Path, options: dict[str, Any]) -> list[object]:
    """The command line of what `run` does with these options."""
    common = {"per_device_train_batch_size": 1, "max_length": T, "use_cpu": True, "save_dtype": "float32"}
    settings = common | options | {"output_dir": output_dir}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["convert", source, "--recipe", "mdm", "--data", text, *flags]


def history(run_directory: Path) -> list[dict[str, float]]:
    states = json.loads((checkpoints(run_directory)[-1] / "trainer_state.json").read_text())
    return [{n: v for n, v in entry.items() if n not in NOT_COMPARED} for entry in states["log_history"]]


def num_passes(checkpoint: Path, process: int) -> int:
    """Passes of the model that a process has made for the rollouts in hand, where it makes them one by one."""
    rollouts = torch.load(checkpoint / f"rollouts-{process}-of-2.pt", weights_only=True)["rollouts"]
    return sum(rollout["num_forwards"] for rollout in rollouts.values())


def assert_same_run(found: Path, expected: Path, *, atol: float = 1e-6, rel: float = 1e-5) -> None:
    """The same weights, and on the way the same losses, gradient norms, measurements, checkpoints, up to rounding."""
    assert_same(weights(found), weights(expected), atol=atol)
    assert [path.name for path in checkpoints(found)] == [path.name for path in checkpoints(expected)]
    for one, other in zip(history(found), history(expected), strict=True):
        assert one == pytest.approx(other, rel=rel, abs=5 * atol)


def test_processes_of_torchrun_train_what_one_trains(tmp_path: Path) -> None:
    source, text = save_source(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}  # hides no error in the gradient's scale
    conversions = {
        "aligned": LENGTH | sgd | ALIGNED,
        "blocks": LENGTH | sgd | BLOCKS | {"align_weight": 1.0},
        "rollouts": LENGTH | sgd | ON_POLICY | {"rollout_prompts": 4},
    }
    lines = []
    for name, options in conversions.items():
        run(source, text, tmp_path / name, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
        lines.append(line(source, text, tmp_path / f"{name}-2", options | {"gradient_accumulation_steps": 2}))
    printed = launch(lines, tmp_path)
    assert printed.count("converted model:") == len(conversions)
    for name in conversions:
        assert_same_run(tmp_path / f"{name}-2", tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "rollouts-2" / "checkpoint-2").glob("rollouts*"))
    assert files == ["rollouts-0-of-2.pt", "rollouts-1-of-2.pt"]


def test_sharded_processes_of_accelerate_train_measure_save_and_resume_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the configuration that docs/convert.md shows."""
    tied, untied = (save_source(tmp_path / family, family) for family in ("qwen3", "llama"))
    text = write_text(tmp_path / "text.jsonl")
    page = (ROOT / "docs" / "convert.md").read_text()
    (tmp_path / "fsdp.yaml").write_text(re.search(r"```yaml\n(# fsdp.yaml\n.*?)```", page, re.DOTALL)[1])
    adam = {"adam_beta2": 0.95, "adam_epsilon": 1e-3, "weight_decay": 0.01, "max_grad_norm": 1.0}
    measured = {"eval_data": str(text), "eval_rows": 2, "eval_steps": 2}
    conversions = {
        "aligned": (tied, LENGTH | adam | ALIGNED | measured | {"freeze_embeddings": True}),
        "blocks": (
            untied,
            LENGTH | adam | BLOCKS | measured | {"align_weight": 1.0, "freeze_embeddings": True} | WORST,
        ),
        "adapters": (untied, LENGTH | adam | measured | ON_POLICY | WARM | {"lora_r": 2, "align_layers": "lower"}),
        "rollouts": (tied, LENGTH | adam | ON_POLICY | {"rollout_prompts": 8, "rollout_updates": 2} | ONE_BY_ONE),
        "drafts": (tied, LENGTH | adam | DRAFTS),
    }
    lines = []
    for name, (source, options) in conversions.items():
        run(source, text, tmp_path / name, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
        lines.append(line(source, text, tmp_path / f"{name}-2", options | {"gradient_accumulation_steps": 2}))
    resumed = ("aligned", "adapters", "rollouts", "drafts")
    for name in resumed:
        source, options = conversions[name]
        from_half = {"resume_from_checkpoint": tmp_path / f"{name}-2" / "checkpoint-2"}
        options = options | from_half | {"gradient_accumulation_steps": 2}
        lines.append(line(source, text, tmp_path / f"{name}-resumed", options))
    in_bf16 = conversions["aligned"][1] | {"bf16": True}
    run(tied, text, tmp_path / "bf16", per_device_train_batch_size=1, gradient_accumulation_steps=4, **in_bf16)
    lines.append(line(tied, text, tmp_path / "bf16-2", in_bf16 | {"gradient_accumulation_steps": 2}))
    for name, value in accelerate_variables(tmp_path / "fsdp.yaml").items():
        monkeypatch.setenv(name, value)
    printed = launch(lines, tmp_path)
    assert "sharded" in printed
    assert_same_run(tmp_path / "bf16-2", tmp_path / "bf16", atol=1e-4, rel=0.02)
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights(tmp_path / "bf16-2").values())
    losses = [history(tmp_path / name)[0]["token_loss"] for name in ("bf16-2", "aligned")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)
    for name in conversions:
        assert_same_run(tmp_path / f"{name}-2", tmp_path / name)
        assert not any(path.name.startswith("pytorch_model") for path in (tmp_path / f"{name}-2").iterdir())
    for name in resumed:
        assert_same(weights(tmp_path / f"{name}-resumed"), weights(tmp_path / f"{name}-2"))
        assert history(tmp_path / f"{name}-resumed") == history(tmp_path / f"{name}-2")
        if name == "drafts":  # whose adapters stand beside the source
            continue
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-2").state_dict()
        for weight, tensor in decausal.load(tmp_path / f"{name}-2").model.state_dict().items():
            assert torch.equal(stock[weight], tensor), weight
    for file in ("adapter_model.safetensors", "mask_row.safetensors"):
        found, expected = (load_file(tmp_path / run / "checkpoint-2" / file) for run in ("adapters-2", "adapters"))
        assert_same(found, expected, atol=1e-6)
    for file in ("adapter_model.safetensors", "mask_row.safetensors", "draft_head.safetensors"):
        found, resumed, expected = (
            load_file(tmp_path / name / "draft" / file) for name in ("drafts-2", "drafts-resumed", "drafts")
        )
        assert_same(found, expected, atol=1e-6)
        assert_same(resumed, found)
    passes = [num_passes(tmp_path / "rollouts-2" / "checkpoint-2", process) for process in range(2)]
    assert passes[0] != passes[1]


ONES = {count.value: torch.ones(()) for count in Count}  # sums stay sums


def _compare_sharded_with_whole(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    (sharded, mask_token_id), (whole, _) = adapted("qwen3"), adapted("qwen3")
    stream = TrainingStream(uneven_rows(), 8, seed=0, shift=1, noising=Noising(2, complementary=True))
    batch = Collator(mask_token_id, 1)([stream[0], stream[1]])
    weights = {TokenTerm(papl=1.0): 1.0, AlignmentTerm((0, 1, 2)): 10.0}
    questions = [question for term in weights for question in term.questions]
    answers = ask(teacher_of("qwen3"), questions, batch, Vocabulary(VOCAB_SIZE, mask_token_id))
    supervision = Supervision(Layout("bidirectional"), mask_token_id)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (sharded, whole):
        install_training_forward(model)
        loss = partial(weighted_loss, model, batch, supervision, weights, ONES, answers)
        model(inside=lambda loss=loss: loss()[0]).backward()
    for (name, parameter), expected in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert parameter.grad.to_local().numel() < expected.numel(), name
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, atol=1e-4, rtol=1e-4, msg=name)
    dist.destroy_process_group()


def _compare_adapters_off(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    stream = TrainingStream(uneven_rows(), 8, seed=0, shift=1, noising=Noising())
    for reshards in (True, False):
        model, mask_token_id = adapted("llama")
        batch = Collator(mask_token_id, 1)([stream[0]])
        rows = batch["clean_ids"], batch["teacher_index"], (0, 1), batch["document_ids"], batch["position_ids"]
        student = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        for module in (*decoder_layers(student), model.lm_head, student):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshards)
        install_training_forward(model)
        supervision = Supervision(Layout("bidirectional"), mask_token_id)
        loss = partial(weighted_loss, model, batch, supervision, {TokenTerm(): 1.0}, ONES, {})
        found: list[torch.Tensor] = []
        ask = partial(AdapterTeacher(student).states, *rows)
        for inside in (lambda ask=ask, found=found: found.extend(ask()), None):  # a step with the teacher, one without
            student.zero_grad()
            if inside is not None:
                student(inside=inside)
            student(inside=lambda loss=loss: loss()[0]).backward()
            adapters = [weight for name, weight in student.named_parameters() if "lora" in name]
            assert all(weight.requires_grad and weight.grad is not None for weight in adapters)
        for states, of_teacher in zip(found, teacher_of("llama").states(*rows), strict=True):
            torch.testing.assert_close(states, of_teacher)
    dist.destroy_process_group()


def _compare_teachers(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    rows = torch.arange(2 * T).view(2, T) % VOCAB_SIZE, torch.tensor([0, 5, T + 3])
    for family in ("qwen3", "llama"):
        whole, sharded = teacher_of(family), teacher_of(family)
        shard_layers(sharded.model)
        for weight in decoder_layers(sharded.model).parameters():
            assert weight.to_local().numel() < weight.numel()
        for layers in ((0,), (0, 1, 2), (1,)):
            found, expected = (teacher.states(*rows, layers) for teacher in (sharded, whole))
            assert all(map(torch.equal, found, expected))
            assert all(isinstance(weight, DTensor) for weight in decoder_layers(sharded.model).parameters())
        found, expected = (
            teacher.distribution(states[-1], 3, banned=0, vocabulary_size=VOCAB_SIZE)
            for teacher, states in ((sharded, found), (whole, expected))
        )
        assert torch.equal(found.log_probs, expected.log_probs)
    dist.destroy_process_group()


@pytest.mark.parametrize("compare", [_compare_sharded_with_whole, _compare_adapters_off, _compare_teachers])
def test_heads_losses_adapters_and_teachers_are_right_where_weights_are_sharded(
    tmp_path: Path, compare: Callable[[int, str], None]
) -> None:
    """FSDP2 gathers a module's weights for its own forward only, and the head is used inside of the model's."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    arguments = str(tmp_path / "rendezvous")
    processes = [fork.Process(target=compare, args=(rank, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
