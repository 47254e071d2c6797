"""The demo's settings. This file is light: the command line reads the class to print its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decausal.errors import UserError
from decausal.training.settings.field import setting


@dataclass(frozen=True)
class DemoSettings:
    """One demo: a model is converted twice, with and without alignment, on little data.

    Raises:
        UserError: A setting is out of its range.
    """

    output_dir: str = setting("decausal-demo", "where both models and the report go; an earlier demo there is replaced")
    model_name_or_path: str = setting("tiny", "AR model: a directory, a hub id, or 'tiny', the embedded one")
    data: str = setting("stdlib", "training text: a file, directory, glob or hub data set, or 'stdlib'")
    eval_data: str = setting("stdlib-heldout", "text that neither run trains on: all figures are measured on it")
    data_fraction: float = setting(0.01, "share of the training documents; 1 takes all. Alignment's claim: scarce data")

    max_steps: int = setting(200, "training steps of each run")
    per_device_train_batch_size: int = setting(4, "rows in a training step")
    max_length: int = setting(256, "tokens in a row")
    learning_rate: float = setting(1e-3, "peak learning rate of both runs")
    align_weight: float = setting(3.0, "weight of the alignment in the aligned run")
    align_schedule: Literal["constant", "linear", "cosine"] = setting("linear", "how that weight falls over the run")
    align_stop_step: int | None = setting(None, "step from which alignment is off")
    freeze_embeddings: bool = setting(False, "freeze embeddings and head in both runs")
    seed: int = setting(0, "of the data, the noise and the mask patterns, the same for both runs")
    bf16: bool | None = setting(
        None, "compute in bfloat16 (weights stay fp32); unset: where the processor is fast at it"
    )

    eval_every: int = setting(20, "steps between two measurements")
    eval_rows: int = setting(32, "held-out rows to measure on, the same each time")
    eval_samples: int = setting(2, "mask patterns per held-out row, the same each time")
    infill_tokens: int = setting(20, "most tokens in the region of a held-out file that is filled in")
    infill_pause: float = setting(0.1, "seconds to rest after each step of the infilling, in a terminal")

    def __post_init__(self) -> None:
        counts = (
            "max_steps",
            "per_device_train_batch_size",
            "eval_every",
            "eval_rows",
            "eval_samples",
            "infill_tokens",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("align_weight", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0")
        if not self.infill_pause >= 0:
            raise UserError(f"--infill_pause {self.infill_pause}: must be at least 0")
