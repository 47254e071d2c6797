"""From a user's training arguments to transformers', and how long a run is."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainingArguments

from decausal.errors import UserError, first_line

# What every run of ours differs in from transformers' defaults, and why.
_ALWAYS = {
    "remove_unused_columns": False,  # batches hold names that no model's forward has
    "logging_nan_inf_filter": False,  # a bad loss stops the run; it is not filtered out of the log
    "average_tokens_across_devices": True,  # losses are means over the global batch
}
_DEFAULTS = {"logging_steps": 10}
_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
}


def training_arguments(values: dict[str, Any]) -> TrainingArguments:
    """Builds transformers' arguments from their fields' values.

    Raises:
        UserError: `output_dir` is missing, or a value is one that transformers does not take.
    """
    if not values.get("output_dir"):
        raise UserError("--output_dir is missing: name the directory that the run is to write to")
    _check_ranges(values)
    _refuse_whole_model_compilation(values)
    has_accelerator = torch.accelerator.is_available()
    defaults = _DEFAULTS | {
        "use_cpu": not has_accelerator,  # transformers wants to be told that a machine has nothing but its CPU
        "disable_tqdm": not sys.stderr.isatty(),
        "accelerator_config": {"non_blocking": has_accelerator},  # copying a batch must not wait for the device
    }
    with argument_errors(), warnings.catch_warnings():
        # transformers renames gradient_checkpointing; both names work, and users know the old one.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        args = TrainingArguments(**(defaults | values | _ALWAYS | {"report_to": values.get("report_to") or "none"}))
    if args.n_gpu > 1:
        args._n_gpu = 1  # nn.DataParallel would cut our flat indices apart: several GPUs need accelerate or torchrun
    return args


@contextmanager
def argument_errors(*others: type[Exception]) -> Iterator[None]:
    """Turns what transformers raises for arguments that it does not take into one line.

    Only errors that speak of a value or of a missing package are about arguments. Anything else is a fault of a
    program, and passes with its traceback.

    Args:
        others: more kinds of error that can only be about arguments, in a call that does nothing but read some.

    Raises:
        UserError: for a ValueError, an ImportError or one of `others`.
    """
    try:
        yield
    except (ValueError, ImportError, *others) as error:
        raise UserError(f"training arguments: {first_line(error)}") from error
    except RuntimeError as error:
        if "to be installed" not in str(error):  # as the integrations of --report_to say it
            raise
        raise UserError(f"training arguments: {first_line(error)}") from error


def rows_per_step(args: TrainingArguments) -> int:
    """Returns the clean rows of one optimiser step, over all accumulated batches and processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def run_length(args: TrainingArguments, num_rows: int) -> int:
    """Sets `args.max_steps` where the run is given in epochs, and returns its number of training rows."""
    if args.max_steps < 0:
        args.max_steps = max(1, math.ceil(args.num_train_epochs * num_rows / rows_per_step(args)))
    return args.max_steps * rows_per_step(args)


def _refuse_whole_model_compilation(values: dict[str, Any]) -> None:
    """Each shape of a whole step would be a program of its own, and after a few of them nothing is compiled."""
    for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode"):
        if values.get(name):
            raise UserError(
                f"--{name} {str(values[name]).lower()}: not for these training steps, which would be compiled anew "
                "for every shape; give --compile_layers true, which compiles the decoder layers"
            )


def _check_ranges(values: dict[str, Any]) -> None:
    for name, bound in _LEAST.items():
        if name in values and not values[name] >= bound:  # nan is not at least anything
            raise UserError(f"--{name} {values[name]}: must be at least {bound}")
    max_steps, epochs = values.get("max_steps", -1), values.get("num_train_epochs", 1)
    if max_steps < 1 and max_steps != -1:
        raise UserError(f"--max_steps {max_steps}: give at least 1, or leave it out and give --num_train_epochs")
    if max_steps == -1 and not 0 < epochs < math.inf:
        raise UserError(f"--num_train_epochs {epochs}: must be above 0")
