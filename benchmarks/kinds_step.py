"""Every kind of training step on a real device: seconds, share of the peak rate, memory, and ratios to the plain step.

    python benchmarks/kinds_step.py --rows 4 --length 4096 --json kinds_step.json

Kinds take turns. The utilisation counts the operations that a step cannot do without (`PaperStep.floor`), not those
that it does.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import peak_bytes
from paper_steps import KINDS, PaperStep
from report import circumstances, console, print_header
from rich.table import Table

from decausal.models.compiled import compile_layers

WARMUP_ROUNDS = 2
MFU_TARGET, ALIGNED_TARGET, TWO_VIEWS_TARGET = 0.45, 1.30, 1.18


def steps(args: argparse.Namespace, device: torch.device) -> dict[str, PaperStep]:
    """Returns the steps to time by name."""
    found = {}
    for name in args.kinds:
        is_flex = device.type == "cuda" and KINDS[name].block_size is not None
        step = PaperStep(KINDS[name], args.model, rows=args.rows, length=args.length, is_flex=is_flex, device=device)
        if args.compile_layers:
            compile_layers(step.student, *([] if step.teacher is None else [step.teacher.model]))
        found[name] = step
    return found


def run(step: PaperStep) -> None:
    """A step in the precision in which that device trains."""
    with torch.autocast(step.device.type, torch.bfloat16, enabled=step.device.type == "cuda"):
        step.run()
    step.student.zero_grad(set_to_none=True)


def seconds(step: PaperStep) -> float:
    """Seconds of one step."""
    wait(step.device)
    start = time.perf_counter()
    run(step)
    wait(step.device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Lets the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(found: dict[str, PaperStep], rounds: int, peak_rate: float) -> dict[str, dict[str, float]]:
    """Returns each kind's figures."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(WARMUP_ROUNDS + rounds):
        for name, step in found.items():
            taken = seconds(step)
            if turn >= WARMUP_ROUNDS:
                times[name].append(taken)
    figures = {}
    for name, step in found.items():
        own, floor = median(times[name]), step.floor()
        figures[name] = {
            "seconds": own,
            "floor_operations": floor,
            "utilisation": floor / own / peak_rate,
            "peak_bytes": peak_bytes(lambda step=step: run(step), step.device),
            "student_tokens": step.batch.get("student_ids", step.batch.get("noised_ids")).numel(),
        }
    plain = figures.get("plain")
    for name, figure in figures.items():
        if plain is not None:
            figure["ratio"] = figure["seconds"] / plain["seconds"]
            figure["floor_ratio"] = figure["floor_operations"] / plain["floor_operations"]
            figure["over_floor"] = figure["ratio"] / figure["floor_ratio"]
        figures[name] = figure
    return figures


def table(figures: dict[str, dict[str, float]]) -> Table:
    """The figures to read."""
    found = Table("kind", "ms", "utilisation", "MB", "ratio to plain", "of its floor", title_justify="left")
    for name, figure in figures.items():
        found.add_row(
            name,
            f"{figure['seconds'] * 1e3:.1f}",
            f"{figure['utilisation']:.1%}",
            f"{figure['peak_bytes'] / 1e6:,.0f}",
            f"{figure.get('ratio', float('nan')):.3f}",
            f"{figure.get('floor_ratio', float('nan')):.3f}",
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", default="qwen3-0.6b" if default_device == "cuda" else "embedded")
    parser.add_argument("--device", default=default_device, choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, default=4, help="rows that the student reads, even")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--compile_layers", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak_rate", type=float, default=989e12, help="operations per second (an H100's or H200's)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    outcome: dict[str, Any] = circumstances()
    print_header(outcome)
    outcome["kinds"] = measure(steps(args, device), args.rounds, args.peak_rate)
    console.print(table(outcome["kinds"]))
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2) + "\n")


if __name__ == "__main__":
    main()
