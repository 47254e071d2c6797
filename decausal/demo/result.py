"""The demo's result, as the terminal, the figures and the page show it."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any

from decausal.data.rows import PackedRows
from decausal.demo.arms import Arm, arm_settings
from decausal.demo.held_out import COSINE_LEVEL, EVAL_SEED, HeldOut
from decausal.demo.history import Crossing, Measure
from decausal.demo.infilling import Filling, Gap
from decausal.demo.settings import DemoSettings
from decausal.evaluation.results import ArLikelihood, Ratio
from decausal.provenance import provenance

REAL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo found, computed by this run.

    Attributes:
        settings: The settings of the demo.
        started: Local time, as ISO 8601 writes it.
        is_bf16: Whether training and measuring computed in bfloat16.
        held_out: The held-out data.
        training_rows: The slice of the corpus that both runs trained on.
        ar: The AR model's own likelihood of the held-out text.
        arms: The runs "plain" and "aligned".
        crossings: Where the aligned run reached the plain run's best, by measure.
        nelbo_difference: Lowest NELBO of the aligned run minus that of the plain run, and its standard error over rows.
        cosines: Cosines to the AR model's hidden states, "before" training and after either run.
        gap: The region of a held-out file that was filled in, or None.
        fillings: What each model wrote there.
        seconds: How long the demo took.
    """

    settings: DemoSettings
    started: str
    is_bf16: bool
    held_out: HeldOut
    training_rows: PackedRows
    ar: ArLikelihood
    arms: dict[str, Arm]
    crossings: dict[Measure, Crossing]
    nelbo_difference: Ratio
    cosines: dict[str, list[float]]
    gap: Gap | None
    fillings: dict[str, Filling]
    seconds: float

    def difference_sentence(self) -> str:
        """Returns the difference of the runs' lowest NELBOs in words, measured pair by pair."""
        value, error = self.nelbo_difference
        if value is None:
            return ""
        way = "below" if value < 0 else "above"
        spread = "" if error is None else f" (standard error {error:.3f}, over the same {self.held_out.num_rows} rows)"
        return f"REPR-ALIGN's lowest NELBO is {abs(value):.3f} nats per token {way} plain denoising's{spread}."

    def commands(self) -> list[str]:
        """Returns what to type next."""
        directories = [shlex.quote(str(arm.conversion.output_dir)) for arm in self.arms.values()]
        lines = [line.strip() for line in (self.gap.prefix if self.gap else "").splitlines() if line.strip()]
        prompt = shlex.quote(lines[-1] if lines else "def add(a, b):")
        options = "--max_new_tokens 32 --watch"
        commands = [f"decausal generate {directory} {prompt} {options}" for directory in reversed(directories)]
        texts = r"--prefix 'def add(a, b):' --suffix $'\n    return total'"
        commands.append(f"decausal infill {directories[-1]} {texts} --length 12 --watch")
        commands.append(f"decausal eval nll {directories[-1]} --data {shlex.quote(self.settings.eval_data)}")
        return commands

    def command_for_real_model(self) -> str:
        """Returns what compares the same two recipes, on the same data, from a pretrained model of the hub."""
        settings = self.settings
        data = f"--data {shlex.quote(settings.data)} --eval_data {shlex.quote(settings.eval_data)}"
        share = f"--data_fraction {settings.data_fraction} --max_steps {settings.max_steps}"
        return f"decausal compare {REAL_MODEL} --recipes mdm,repr-align --eval nll {data} {share} --output_dir compared"

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures and what they depend on, as in `report.json`."""
        config = self.held_out.source.config
        return {
            "settings": asdict(self.settings),
            "started": self.started,
            "seconds": self.seconds,
            **provenance(),
            "is_bf16": self.is_bf16,
            "source": {
                "model_name_or_path": self.settings.model_name_or_path,
                "model_type": config.model_type,
                "num_parameters": self.held_out.source.num_parameters(),
                "num_layers": config.num_hidden_layers,
                "likelihood": asdict(self.ar),
            },
            "training_data": {
                "num_documents": self.training_rows.num_documents,
                "num_tokens": self.training_rows.num_tokens,
                "num_rows": len(self.training_rows),
            },
            "held_out_data": {
                "num_rows": self.held_out.num_rows,
                "num_tokens": self.ar.num_tokens,
                "num_bytes": self.ar.num_bytes,
                "samples_per_row": self.held_out.samples_per_row,
                "mask_seed": EVAL_SEED,
            },
            "arms": {name: self._arm_as_dict(arm) for name, arm in self.arms.items()},
            "crossings": {
                name: asdict(found) | {"sentence": found.sentence()} for name, found in self.crossings.items()
            },
            "nelbo_difference": self.nelbo_difference._asdict(),
            "cosines": {"noise_level": COSINE_LEVEL, "positions": "targets", **self.cosines},
            "infilling": None if self.gap is None else {"gap": asdict(self.gap), "fillings": self._fillings_as_dict()},
            "commands": self.commands(),
            "command_for_real_model": self.command_for_real_model(),
        }

    def _arm_as_dict(self, arm: Arm) -> dict[str, Any]:
        conversion, training = arm_settings(self.settings, arm.name, is_bf16=self.is_bf16)
        return {
            "directory": str(arm.conversion.output_dir),
            "recipe": asdict(conversion) | training,
            "measurements": [asdict(measurement) for measurement in arm.measurements],
            "final_likelihood": arm.likelihoods[-1].as_dict(),
            "token_losses": arm.token_losses,
            "step_seconds": arm.step_seconds,
        }

    def _fillings_as_dict(self) -> dict[str, Any]:
        return {name: asdict(filling) | {"text": filling.text} for name, filling in self.fillings.items()}
