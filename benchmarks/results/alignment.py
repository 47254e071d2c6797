"""REPR-ALIGN against plain denoising on a real model: held-out NELBO by step, by operations and by time.

    python benchmarks/results/alignment.py SMOLLM2 --data DIR --work WORK [--seeds 0,1,2] [--minutes 100]

Runs differ in one thing each: alignment or not, share of the data (1, 10, 100 % of WikiText-2's validation articles and
the standard library), embeddings frozen or not. All have the same steps, rows, noise and learning rate. The NELBO of
WikiText-2's test articles is measured while they train, six times and at the start. `--rates 3e-5,1e-4,3e-4` looks for
the learning rate first, on a tenth of the data; `--fractions 0.01` measures one share. WORK/alignment.md is the table,
WORK/alignment.png and WORK/report.html the curves. `--known alignment.json` goes on from an earlier result, on this
machine or another.

    step        step at which the aligned run meets the plain run's lowest NELBO, over the step of that
    operations  the same by floating-point operations (benchmarks/floors.py): an aligned step has the teacher's pass too
    seconds     the same by seconds of training
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from floors import ModelShape
from results.figures import draw_curves
from results.steps import Step, conversion, decimals, parser, publish, run_or_print, runs_of
from results.texts import articles

from decausal.models.adapt import load_source
from decausal.provenance import provenance
from decausal.report.sources import read_run
from decausal.reporting import share_of_the_way

Curve = list[dict[str, float]]
"""Of a run, at each evaluation: "step", "seconds" and "nelbo" in nats per token."""
MEASURE = "eval_nelbo_per_token"
ROWS, LENGTH, STEPS = 2, 256, 48
FRACTIONS = (0.01, 0.1, 1.0)
RECIPES = ("mdm", "repr-align")


def steps_of(flags: argparse.Namespace) -> list[Step]:
    """Returns the runs that are not known yet: the learning rates to choose from, or the comparison."""
    train = articles(flags.data, "wikitext2_valid.txt", flags.work / "data" / "train.jsonl")
    held_out = articles(flags.data, "wikitext2_test.txt", flags.work / "data" / "held_out.jsonl")
    common = ["--eval_data", str(held_out), "--eval_rows", str(flags.limit or 8), "--eval_samples", "2"]
    common += ["--eval_on_start", "true", "--eval_steps", str(max(1, (flags.steps or STEPS) // 6))]
    common += ["--max_length", str(LENGTH), "--per_device_train_batch_size", str(ROWS)]
    return [
        conversion(
            flags,
            flags.work / name_of(recipe, fraction, rate, is_frozen, seed),
            recipe,
            f"{train},stdlib",
            flags.steps or STEPS,
            seed,
            *common,
            *("--data_fraction", str(fraction), "--learning_rate", str(rate)),
            *("--freeze_embeddings", str(is_frozen).lower()),
        )
        for seed in flags.seeds
        for fraction, rate, is_frozen in cells(flags)
        for recipe in RECIPES
        if name_of(recipe, fraction, rate, is_frozen, seed) not in flags.known
    ]


def cells(flags: argparse.Namespace) -> list[tuple[float, float, bool]]:
    """Returns (share of the data, learning rate, whether embeddings are frozen) of all pairs of runs."""
    return [
        (fraction, rate, is_frozen)
        for is_frozen in ((False,) if flags.rates else (False, True))
        for fraction in ((0.1,) if flags.rates else flags.fractions)
        for rate in flags.rates or (flags.learning_rate,)
    ]


def known(path: str) -> dict[str, Curve]:
    """Reads the curves of an earlier result."""
    return json.loads(Path(path).read_text(encoding="utf-8"))["runs"]


def name_of(recipe: str, fraction: float, rate: float, is_frozen: bool, seed: int) -> str:
    """Returns a run's name."""
    return f"{recipe}-data{fraction:g}-rate{rate:g}{'-frozen' if is_frozen else ''}-seed{seed}"


def crossing(plain: Curve, aligned: Curve, cost: float) -> dict[str, float]:
    """Returns where the aligned run meets the lowest value of the plain one, over where that is.

    `cost` is the operations of an aligned step over those of a plain one. Empty if it never does,
    and if the plain run was best before its first step.
    """
    lowest = min(plain, key=lambda point: point["nelbo"])
    if not lowest["step"]:
        return {}
    for before, after in pairwise(aligned):
        if after["nelbo"] <= lowest["nelbo"] < before["nelbo"]:
            way = share_of_the_way(before["nelbo"], after["nelbo"], lowest["nelbo"])
            step, seconds = ((before[by] + way * (after[by] - before[by])) / lowest[by] for by in ("step", "seconds"))
            return {"step": step, "operations": cost * step, "seconds": seconds}
    return {}


def curve_of(directory: Path) -> Curve:
    """Returns what a run measured: step, seconds and held-out NELBO."""
    log = read_run(directory).log
    return [
        {"step": entry["step"], "seconds": entry["seconds"], "nelbo": entry[MEASURE]}
        for entry in log
        if MEASURE in entry
    ]


def table(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns lowest and last values, and where aligned runs meet plain ones, over seeds."""
    curves: dict[str, Curve] = dict(flags.known)
    for run in runs_of(steps_of(flags)):
        curves[run.name] = curve_of(run)
    shape = ModelShape.of(load_source(flags.model)[0])
    cost = shape.aligned_step(LENGTH, 0.5, 1) / shape.plain_step(LENGTH, 0.5)
    rows = []
    for fraction, rate, is_frozen in cells(flags):
        pairs = [
            [curves[name_of(recipe, fraction, rate, is_frozen, seed)] for recipe in RECIPES] for seed in flags.seeds
        ]
        crossings = [crossing(plain, aligned, cost) for plain, aligned in pairs]
        rows.append(
            {"data": fraction, "rate": rate, "frozen": is_frozen}
            | {f"lowest {recipe}": spread([low(pair[i]) for pair in pairs]) for i, recipe in enumerate(RECIPES)}
            | {
                by: spread([each[by] for each in crossings]) if all(by in each for each in crossings) else None
                for by in ("step", "operations", "seconds")
            }
        )
    command = " ".join(["python", *sys.argv])
    made = {"command": command, "seeds": flags.seeds, "operations of a step": cost}
    return provenance() | made | {"rows": rows, "runs": curves}


def low(curve: Curve) -> float:
    """Returns a run's lowest held-out NELBO."""
    return min(point["nelbo"] for point in curve)


def spread(values: list[float]) -> list[float]:
    """Returns the mean over seeds, and the deviation where there are several."""
    return [fmean(values), *([stdev(values)] if len(values) > 1 else [])]


def draw(flags: argparse.Namespace, curves: dict[str, Curve]) -> None:
    """Draws the curves of all runs by steps, a panel for each share of the data, embeddings trained."""
    panels = {}
    for fraction in flags.fractions:
        panels[f"{fraction:.0%} of the data"] = {
            label: [
                [
                    (point["step"], point["nelbo"])
                    for point in curves[name_of(recipe, fraction, flags.learning_rate, False, seed)]
                ]
                for seed in flags.seeds
            ]
            for label, recipe in zip(("plain", "aligned"), RECIPES, strict=True)
        }
    draw_curves(flags.work / "alignment.png", panels, "steps", "held-out NELBO, nats per token")


def as_markdown(found: dict[str, Any]) -> str:
    """Returns the table."""
    lines = ["| data | rate | embeddings | plain, lowest | aligned, lowest | step | operations | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        shown = [" ± ".join(f"{value:.3f}" for value in row[name] or []) or "never" for name in list(row)[3:]]
        frozen = "frozen" if row["frozen"] else "trained"
        lines.append(f"| {row['data']:.0%} | {row['rate']:g} | {frozen} | {' | '.join(shown)} |")
    hardware = found["hardware"]
    return (
        "\n".join(lines)
        + f"\n\n`{found['command']}`, commit {found['commit']}, {found['date']}, {hardware['processor']}, "
        f"{hardware['torch_threads']} threads, seeds {found['seeds']}\n"
    )


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--learning_rate", type=float, default=1e-4, help="of all runs (1e-4)")
    made.add_argument("--known", type=known, default={}, help="an earlier alignment.json, whose runs are taken from it")
    made.add_argument("--fractions", type=decimals, default=FRACTIONS, help="shares of the data (0.01,0.1,1)")
    made.add_argument("--rates", type=decimals, help="compare learning rates instead")
    flags = made.parse_args()
    steps = steps_of(flags)
    if not run_or_print(steps, flags):
        return
    found = table(flags)
    if not flags.rates:
        draw(flags, found["runs"])
    name = "rates" if flags.rates else "alignment"
    publish(flags.work, name, "Alignment", found, as_markdown(found), runs_of(steps))


if __name__ == "__main__":
    main()
