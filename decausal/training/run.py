"""From a user's training arguments to transformers', and how long a run is."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainingArguments

from decausal.errors import UserError

# What every run of ours differs in from transformers' defaults, and why.
_ALWAYS = {
    "remove_unused_columns": False,  # batches hold names that no model's forward has
    "logging_nan_inf_filter": False,  # a bad loss stops the run; it is not filtered out of the log
    "average_tokens_across_devices": True,  # losses are means over the global batch
}
_DEFAULTS = {"report_to": "none", "disable_tqdm": True, "logging_steps": 10}


def training_arguments(values: dict[str, Any]) -> TrainingArguments:
    """Builds transformers' arguments from their fields' values.

    Raises:
        UserError: `output_dir` is missing, or a value is one that transformers does not take.
    """
    if not values.get("output_dir"):
        raise UserError("--output_dir is missing: name the directory that the run is to write to")
    # transformers wants to be told that a machine has nothing but its CPU
    has_accelerator = torch.accelerator.is_available()
    values = _DEFAULTS | {"use_cpu": not has_accelerator} | values | _ALWAYS
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"training arguments: {str(error).splitlines()[0]}") from error


def rows_per_step(args: TrainingArguments) -> int:
    """Returns the clean rows of one optimiser step, over all accumulated batches and processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def run_length(args: TrainingArguments, num_rows: int) -> int:
    """Sets `args.max_steps` where the run is given in epochs, and returns its number of training rows.

    Raises:
        UserError: the run would have no step.
    """
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * num_rows / rows_per_step(args))
    if args.max_steps <= 0:
        raise UserError(
            f"--max_steps {args.max_steps} and --num_train_epochs {args.num_train_epochs}: no step to train"
        )
    return args.max_steps * rows_per_step(args)
