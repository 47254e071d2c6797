"""Checks what a resumed run must have in common with the run that saved its checkpoint. The rest may change.

It may change what affects neither the model nor its training: the length of the run, and how it is measured, logged and
saved. A step may be split otherwise over micro-batches and processes, and the same data may have moved. The precision
may change too, and a line says so. Anything else is refused. Some of it would be ignored, since transformers restores
the learning rate and its schedule from the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import yaml
from transformers import TrainingArguments

from decausal.data.reading import say
from decausal.data.stream import TrainingStream
from decausal.errors import UserError
from decausal.files import parsed_yaml
from decausal.privacy import without_secrets
from decausal.training.on_policy import OnPolicyStream, parts_of
from decausal.training.run import rows_per_step
from decausal.training.run_directory import RUN_FILE, sealed
from decausal.wording import quantity

MAY_CHANGE = frozenset(
    """
    eval_data eval_split eval_rows eval_samples overwrite attn_implementation compile_layers save_dtype sample_prompts
    sample_tokens rollout_batch_size data text_field prompt_field completion_field dataset_split on_bad_record
    dataset_num_proc chat_template chat_template_kwargs
    """.split()  # noqa: SIM905
)
"""Our settings that may change. Those about data are included because the rows themselves are compared."""

FIXED_ARGUMENTS = """
    seed learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay adam_beta1
    adam_beta2 adam_epsilon max_grad_norm optim optim_args
""".split()  # noqa: SIM905
"""Transformers' arguments that decide how a step changes the weights."""

_SAMPLED_ROWS = 1024
_REMEDY = "give the run's own settings to continue it, or start another run in another directory"


def run_record(settings: Mapping[str, Any], args: TrainingArguments, rows: str) -> dict[str, Any]:
    """Returns what a checkpoint records of its run.

    Args:
        settings: Our settings, by name.
        args: Transformers' arguments.
        rows: Fingerprint of the rows that are trained on.
    """
    return {
        "settings": _fixed_settings(settings),
        "arguments": _fixed_arguments(args),
        "rows_per_step": rows_per_step(args),
        "precision": _precision(args),
        "rows": rows,
    }


def fingerprint(stream: TrainingStream | OnPolicyStream) -> str:
    """Returns a hash of a run's rows or prompts: of all if they are few, else of a sample.

    The sample is spread evenly, so adding or removing a document anywhere changes it. Of streamed rows, the first
    window is looked at.
    """
    found = xxhash.xxh3_128()
    for part in parts_of(stream):
        found.update(str(len(part)).encode())
        for index in np.unique(np.linspace(0, len(part) - 1, min(len(part), _SAMPLED_ROWS)).astype(int)).tolist():
            item = part[index]
            for tensor in item.values() if isinstance(item, dict) else [item]:
                found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def refuse_other_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError if our settings differ from those of the run that saved the checkpoint."""
    before = sealed(checkpoint).get("settings")
    if before is None:  # saved by an earlier version
        before = _read_run_file(checkpoint.parent / RUN_FILE)
    _refuse_difference(checkpoint, before, _fixed_settings(settings))


def refuse_other_arguments(checkpoint: Path, args: TrainingArguments) -> None:
    """Raises UserError if transformers' arguments would give other steps, or steps with other rows."""
    before, num_rows = sealed(checkpoint), rows_per_step(args)
    _refuse_difference(checkpoint, before.get("arguments", {}), _fixed_arguments(args))
    if before.get("rows_per_step", num_rows) != num_rows:
        raise UserError(
            f"an optimizer step would read {quantity(num_rows, 'row')}, and in {checkpoint} it read "
            f"{before['rows_per_step']}: rows would be skipped or read twice; choose --per_device_train_batch_size, "
            "--gradient_accumulation_steps and the number of processes so that their product stays"
        )


def say_other_precision(checkpoint: Path, args: TrainingArguments) -> None:
    """Says so if the run continues in another precision, for example after moving from a CPU to a GPU."""
    before, now = sealed(checkpoint).get("precision"), _precision(args)
    if before not in (None, now):
        say(f"goes on in {now}; {checkpoint} was trained in {before}, so the weights will not be quite the same")


def refuse_other_rows(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Raises UserError if the data do not give the rows that the run has trained on so far.

    Args:
        checkpoint: The checkpoint to resume from.
        record: The current `run_record`.
    """
    if sealed(checkpoint).get("rows", record["rows"]) != record["rows"]:
        raise UserError(
            f"the data give other rows than those that {checkpoint} was trained on: they have changed, or are read in "
            f"another way; {_REMEDY}"
        )


def _fixed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return _plain({name: value for name, value in settings.items() if name not in MAY_CHANGE})


def _fixed_arguments(args: TrainingArguments) -> dict[str, Any]:
    return _plain({name: getattr(args, name) for name in FIXED_ARGUMENTS if hasattr(args, name)})


def _precision(args: TrainingArguments) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Returns values as they come back from a checkpoint's JSON."""
    return json.loads(json.dumps(without_secrets(values), default=str))


def _refuse_difference(checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if name in before and before[name] != value:
            raise UserError(
                f"--{name} {_shown(value)}: {checkpoint} was trained with {_shown(before[name])}; {_REMEDY}"
            )


def _shown(value: Any) -> str:
    """Returns a setting's value as a user writes it."""
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value)


def _read_run_file(path: Path) -> Mapping[str, Any]:
    if not path.exists():  # the checkpoint was copied elsewhere
        return {}
    try:
        values = parsed_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}; remove it to continue") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not the record of a run: it was cut off or changed; remove it to continue")
    return values
