"""From a user's training arguments to transformers', and the length of a run."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainingArguments

from decausal.devices import best_device, choices, multiplies_bf16
from decausal.errors import UserError, first_line
from decausal.training.argument_values import ALWAYS, DEFAULTS, check_values


def training_arguments(values: dict[str, Any]) -> TrainingArguments:
    """Builds transformers' arguments from their fields' values.

    Raises:
        UserError: `output_dir` is missing, or transformers does not accept a value.
    """
    check_values(values)
    has_accelerator = torch.accelerator.is_available()
    device = torch.device("cpu") if values.get("use_cpu") else best_device()
    defaults = (
        DEFAULTS
        | precision_on(device, values)
        | {
            "use_cpu": not has_accelerator,  # transformers has to be told if there is only a CPU
            "disable_tqdm": not sys.stderr.isatty(),
            "accelerator_config": {"non_blocking": has_accelerator},  # copying a batch must not wait for the device
        }
    )
    with argument_errors(), warnings.catch_warnings():
        # transformers renames gradient_checkpointing. Both names work, and users know the old one.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        args = TrainingArguments(**(defaults | values | ALWAYS | {"report_to": values.get("report_to") or "none"}))
    if args.n_gpu > 1:
        args._n_gpu = 1  # nn.DataParallel would break our flat indices: several GPUs need accelerate or torchrun
    return args


def precision_on(device: torch.device, values: dict[str, Any]) -> dict[str, bool]:
    """Returns the arguments of mixed precision, if the device is made for it and `values` do not set it."""
    is_said = any(values.get(name) is not None for name in ("bf16", "fp16"))
    return {"bf16": True} if choices(device).is_mixed and multiplies_bf16(device) and not is_said else {}


@contextmanager
def argument_errors(*others: type[Exception]) -> Iterator[None]:
    """Turns transformers' errors about arguments into one line.

    Only errors about a value or a missing package are about arguments. Anything else is a bug, and keeps its traceback.

    Args:
        others: More types of errors that can only be about arguments, in a call that only reads some.

    Raises:
        UserError: For a ValueError, an ImportError or one of `others`.
    """
    try:
        yield
    except (ValueError, ImportError, *others) as error:
        raise UserError(f"training arguments: {first_line(error)}") from error
    except RuntimeError as error:
        if "to be installed" not in str(error):  # the words of --report_to's integrations
            raise
        raise UserError(f"training arguments: {first_line(error)}") from error


def rows_per_step(args: TrainingArguments) -> int:
    """Returns the clean rows of one optimiser step, over all accumulated batches and processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def run_length(args: TrainingArguments, num_rows: int) -> int:
    """Sets `args.max_steps` if the length is given in epochs, and returns the number of training rows."""
    if args.max_steps < 0:
        args.max_steps = max(1, math.ceil(args.num_train_epochs * num_rows / rows_per_step(args)))
    return args.max_steps * rows_per_step(args)
