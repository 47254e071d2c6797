"""Tiny conversions for tests: a source model on disk, text of uneven documents, and runs of a few steps."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from decausal.cli import main
from decausal.data.block_collator import BlockCollator
from decausal.data.stream import Collator, Noising, TrainingStream
from decausal.diffusion.layout import Layout
from decausal.files import umask
from decausal.models.adapt import adapt
from decausal.models.checkpoint import save_converted
from decausal.models.facts import ConversionFacts
from decausal.training.convert import Conversion, convert
from decausal.training.losses import Supervision, Weighted
from decausal.training.run import run_length, training_arguments
from decausal.training.schedule import WeightSchedule
from decausal.training.settings import ConversionSettings
from decausal.training.teacher import Teacher
from decausal.training.terms import AlignmentTerm, TokenTerm
from decausal.training.trainer import ConversionTrainer
from tests.families import FAMILIES, MAX_LENGTH, VOCAB_SIZE, tiny_tokenizer
from tests.hangs import PATIENCE

GATED: dict[str, Any] = {
    "layout": "block",
    "block_size": 3,
    "causal_context": True,
    "shift": 1,
    "weights": "gated",
    "noise": "all",
    "token_weight": 0.0,
    "kl_weight": 1.0,
    "save_dtype": "source",
}
"""Drafts by masks that gated weights read, trained on the AR model's distributions."""
BIDIRECTIONAL = Layout("bidirectional")
ROOT = Path(__file__).parent.parent
T = 24
TEXT = "the rain in spain stays on the hat that a heron saw in the other inn then another one ran there"
TRAINING = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}


def save_source(directory: Path, family: str = "qwen3", *, chat: bool = False, **changes: Any) -> Path:
    """Writes a tiny random AR model with its tokenizer; `changes` override the family's configuration."""
    FAMILIES[family](**changes).save_pretrained(directory)
    tiny_tokenizer(chat).save_pretrained(directory)
    return directory


def write_text(path: Path, num_documents: int = 40) -> Path:
    """Writes documents whose lengths differ by a factor of 40, so that rows differ in their numbers of targets."""
    words = TEXT.split()
    documents = [" ".join(words[(3 * i + j) % len(words)] for j in range(1 + i)) for i in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def run(
    source: Path,
    data: Path | str | tuple[str, ...],
    output_dir: Path,
    *,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> Conversion:
    """Converts with settings of ours and transformers' mixed, as on the command line."""
    own = {name for name in ConversionSettings.__dataclass_fields__ if name in options}
    settings = {"max_length": T, "save_dtype": "float32"} | {name: options.pop(name) for name in own}
    training = TRAINING | options | {"output_dir": str(output_dir)}
    return convert(
        ConversionSettings(
            model_name_or_path=str(source), data=data if isinstance(data, tuple) else str(data), **settings
        ),
        training,
        callbacks=callbacks,
    )


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def kept_from_others(directory: Path) -> list[str]:
    """Returns the files that the umask would let others read, and whose own mode does not."""
    wanted = 0o666 & ~umask()
    files = (path for path in directory.rglob("*") if path.is_file())
    return [str(path) for path in files if wanted & ~path.stat().st_mode]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 0.0) -> None:
    """Asserts equality of all tensors: bit for bit, unless `atol` is given."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if atol:
            torch.testing.assert_close(
                found[name], tensor, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert torch.equal(found[name], tensor), name


def assert_saved_as_plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Asserts that a model is written as plain numbers, as any model of its family is."""
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    save_converted(directory, model, tokenizer, ConversionFacts("x", "causal", 1, 0))
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    found, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert_same(found.state_dict(), model.state_dict())


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, from a directory that is not the checkout."""
    return run_python("-m", "decausal", *arguments)


def run_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(),
        cwd=os.environ["HF_HOME"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def call_in_a_copy(*arguments: object) -> multiprocessing.process.BaseProcess:
    """Starts the command line in a copy of this process, for tests of what kills it: a new one imports for seconds."""
    process = multiprocessing.get_context("fork").Process(target=_main_in_a_copy, args=(list(map(str, arguments)),))
    process.start()
    return process


def _main_in_a_copy(arguments: list[str]) -> None:
    torch.set_num_threads(1)  # those of the first process are not in the copy
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(main(arguments))


def uneven_rows(num_rows: int = 16, length: int = T, seed: int = 0) -> list[dict[str, Tensor]]:
    """Packed rows of two documents and padding, with 1 to `length` tokens that may be masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(num_rows):
        document_ids = torch.zeros(length, dtype=torch.int64)
        document_ids[length // 3 :] = 1
        document_ids[length - number % 3 :] = -1
        is_maskable = (torch.arange(length) < 2 + (5 * number) % length) & (document_ids >= 0)
        clean_ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator)
        rows.append({"clean_ids": clean_ids, "document_ids": document_ids, "is_maskable": is_maskable})
    return rows


def adapted(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[PreTrainedModel, int]:
    """A tiny student with its mask token."""
    model = FAMILIES[family](**changes).to(dtype)
    return model, adapt(model, tiny_tokenizer())


def teacher_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Teacher:
    """The same model before it was adapted, frozen."""
    return Teacher(FAMILIES[family](**changes).to(dtype))


def make_trainer(
    output_dir: Path,
    rows: Any,
    *,
    family: str = "qwen3",
    dtype: torch.dtype = torch.float32,
    layout: Layout = BIDIRECTIONAL,
    shift: int = 1,
    noising: Noising | None = None,
    weighting: str = "none",
    aligned_positions: str = "targets",
    supervision: dict[str, Any] | None = None,  # papl, anneal_steps, and the schedule of an alignment
    changes: dict[str, Any] | None = None,
    **training: Any,
) -> ConversionTrainer:
    """A trainer over rows in memory; plain SGD by default, which hides no error in the gradient's scale."""
    values = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no"}
    args = training_arguments(TRAINING | values | training | {"output_dir": str(output_dir)})
    model, mask_token_id = adapted(family, dtype, **(changes or {}))
    options = dict(supervision or {})
    losses = [Weighted(TokenTerm(options.pop("papl", 0.0)), WeightSchedule(1.0))]
    is_aligned = "alignment" in options
    if is_aligned:
        layers = tuple(range(model.config.num_hidden_layers + 1))
        losses.append(Weighted(AlignmentTerm(layers), options.pop("alignment")))
    return ConversionTrainer(
        model,
        args,
        stream=TrainingStream(
            rows, run_length(args, len(rows)), seed=args.seed, shift=shift, noising=noising or Noising()
        ),
        collator=(
            BlockCollator(mask_token_id, shift, layout, MAX_LENGTH, weighting, aligned_positions)
            if layout.kind == "block"
            else Collator(mask_token_id, shift, weighting, aligned_positions)
        ),
        supervision=Supervision(layout, mask_token_id, tuple(losses), **options),
        teacher=teacher_of(family, dtype, **(changes or {})) if is_aligned else None,
    )


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def logged(trainer: Any, name: str) -> list[float]:
    history = trainer.state.log_history if hasattr(trainer, "state") else trainer.history
    return [entry[name] for entry in history if name in entry]
