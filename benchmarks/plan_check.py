"""What `decausal plan` says before a run beside what steps then take, on this machine's CPU.

    OMP_NUM_THREADS=1 python benchmarks/plan_check.py MODEL --recipes mdm lossless --rows 4 --length 256

Memory: bytes of live tensors after each operator of a step with numbers. Time: of steps with all rows, while the plan
measures a part of them. Weights are random.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from measure import peak_bytes

from decausal.config import read_recipe, resolve
from decausal.provenance import provenance
from decausal.training.planning import timing
from decausal.training.planning.footprint import footprint
from decausal.training.planning.step import PlannedStep, planned_step
from decausal.training.settings import ConversionSettings

CPU = torch.device("cpu")


def check(model: str, recipe: str, flags: list[str], rows: int, longest: float) -> dict[str, Any]:
    """Returns a plan's figures beside measured ones."""
    settings, training = resolve(ConversionSettings, read_recipe(recipe), ["--model_name_or_path", model, *flags])
    training |= {"per_device_train_batch_size": rows}
    planned = footprint(planned_step(settings, training, CPU))

    def prepare(num_rows: int) -> PlannedStep:
        return planned_step(settings, training, CPU, where=CPU, num_rows=num_rows)

    def operations(num_rows: int) -> float:
        return footprint(planned_step(settings, training, CPU, num_rows=num_rows)).tally.operations

    planned = timing.measured_time(prepare, rows, operations, longest)
    real = timing.Measured(planned_step(settings, training, CPU, where=CPU))
    real.micro_batch()
    measured_seconds = real.micro_batch()
    peaks = []
    for terms, _ in real.step.stages():
        real.forget_gradients()
        peaks.append(peak_bytes(lambda terms=terms: real.run(terms), CPU))
    of_step = planned.answers + planned.activations + planned.copies + planned.working
    return {
        "recipe": recipe,
        "planned_step_bytes": of_step,
        "measured_step_bytes": max(peaks),
        "memory_ratio": of_step / max(peaks),
        "planned_seconds": planned.micro_batch,
        "time_is": planned.origin,
        "measured_seconds": measured_seconds,
        "time_ratio": planned.micro_batch / measured_seconds,
        "parts": planned.parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--recipes", nargs="+", default=["mdm", "repr-align", "bd3lm", "lossless"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--longest", type=float, default=5.0, help="seconds of a micro-batch that the plan may measure")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bf16", default="false")
    args = parser.parse_args()
    found = [
        check(args.model, recipe, ["--max_length", str(args.length), "--bf16", args.bf16], args.rows, args.longest)
        for recipe in args.recipes
    ]
    print(json.dumps(provenance() | {"checks": found}, indent=2))


if __name__ == "__main__":
    main()
