"""Values of transformers' training arguments: our defaults, and checks that do not need transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from decausal.errors import UserError
from decausal.privacy import without_secrets
from decausal.trainer_fields import trainer_fields

# Our defaults, where they differ from transformers'.
ALWAYS: dict[str, Any] = {
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "average_tokens_across_devices": True,
}
_OF_EVALUATION = "evaluation is by --eval_data, --eval_rows, --eval_samples and --sample_prompts"
_OF_ROWS = "the rows of a step follow only from --seed and its number"
# Arguments without effect, and why.
WITHOUT_EFFECT = {
    "remove_unused_columns": "batches hold names that models' forwards do not have",
    "logging_nan_inf_filter": "a loss that is not finite always stops the run",
    "average_tokens_across_devices": "losses are means over the global batch",
    "label_smoothing_factor": "the losses are those of the recipe",
    "label_names": "the losses are those of the recipe",
    "data_seed": _OF_ROWS,
    "train_sampling_strategy": _OF_ROWS,
    "length_column_name": _OF_ROWS,
    "dataloader_drop_last": "every step reads as many rows",
    "per_device_eval_batch_size": _OF_EVALUATION,
    "prediction_loss_only": _OF_EVALUATION,
    "eval_accumulation_steps": _OF_EVALUATION,
    "eval_do_concat_batches": _OF_EVALUATION,
    "eval_use_gather_object": _OF_EVALUATION,
    "include_for_metrics": _OF_EVALUATION,
    "batch_eval_metrics": _OF_EVALUATION,
    "bf16_full_eval": _OF_EVALUATION,
    "fp16_full_eval": _OF_EVALUATION,
    "do_train": "the command decides this",
    "do_eval": "the command decides this",
    "do_predict": "the command decides this",
}
DEFAULTS: dict[str, Any] = {"logging_steps": 10, "report_to": "none"}
PRETRAIN_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5e-3,
    "weight_decay": 0.1,
    "warmup_steps": 100,
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 400, "min_lr_ratio": 0.02},
    "bf16": True,
    "max_steps": 1500,
    "save_steps": 100,
    "save_total_limit": 2,
    "logging_steps": 20,
}
_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
}


def check_values(values: Mapping[str, Any]) -> None:
    """Refuses what can be seen without transformers.

    Raises:
        UserError: `output_dir` is missing, or a value is out of its range or not for our training steps.
    """
    if not values.get("output_dir"):
        raise UserError("--output_dir is missing: name the directory for the run")
    for name, bound in _LEAST.items():
        if name in values and not values[name] >= bound:  # not nan either
            raise UserError(f"--{name} {values[name]}: must be at least {bound}")
    max_steps, epochs = values.get("max_steps", -1), values.get("num_train_epochs", 1)
    if max_steps < 1 and max_steps != -1:
        raise UserError(f"--max_steps {max_steps}: give at least 1, or leave it out and give --num_train_epochs")
    if max_steps == -1 and not 0 < epochs < math.inf:
        raise UserError(f"--num_train_epochs {epochs}: must be above 0")
    _refuse_whole_model_compilation(values)
    for name, value in values.items():
        if name in WITHOUT_EFFECT and value != ALWAYS.get(name, trainer_fields()[name].default):
            raise UserError(f"--{name} {value} would have no effect: {WITHOUT_EFFECT[name]}; leave it out")
        if isinstance(value, dict | list) and without_secrets(value) != value:
            raise UserError(
                f"--{name} holds a secret, which would be recorded with the run: remove it; libraries read theirs "
                "from the environment"
            )


def _refuse_whole_model_compilation(values: Mapping[str, Any]) -> None:
    """Refuses to compile whole steps: each shape would be another program, and after a few nothing is compiled."""
    for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode"):
        if values.get(name):
            raise UserError(
                f"--{name} {str(values[name]).lower()}: not for these training steps, which would be compiled again "
                "for every shape; give --compile_layers true, which compiles the decoder layers"
            )
