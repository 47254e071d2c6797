"""A comparison from start to end: checks all arms, measures the AR model, trains what is missing, and reports."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from decausal.compare.arms import Arm, ArmRun
from decausal.compare.budget import Budget, steps_for_tokens, training_rows
from decausal.compare.inputs import MARK, all_runs, refuse_other_verb
from decausal.compare.measuring import Measure, prepare
from decausal.compare.report import REPORT_PICTURE, REPORT_TABLE, Comparison, write_figures, write_report
from decausal.compare.settings import CompareSettings
from decausal.compare.training import (
    Planned,
    RunResult,
    described,
    refuse_other_run,
    steps_before,
    tried_steps,
)
from decausal.compare.view import ComparisonView, summary_table
from decausal.compare.workers import num_workers, train_all
from decausal.devices import best_device, multiplies_bf16
from decausal.errors import UserError
from decausal.reporting import quiet_libraries
from decausal.training.run_directory import claimed


def run_compare(
    settings: CompareSettings, arms: Sequence[Arm], console: Console | None = None, command: str = ""
) -> Comparison:
    """Trains every arm with every seed from the same AR model and budget, measures all in the same way, and reports.

    Finished runs are not trained again. A killed run continues from its last measurement.

    Args:
        settings: What to compare, on what, for how long.
        arms: See `decausal.compare.arms.read_arms`.
        console: Where to print; the standard output by default.
        command: The command line, for the report.

    Returns:
        The findings. `output_dir` then holds a converted model for each run, and the report.

    Raises:
        UserError: As `decausal.training.convert.convert`, or the arms cannot be compared, or the directory holds
            something else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("decausal compare runs in one process: start it without accelerate launch or torchrun")
    console = console or Console(file=sys.stdout)
    output_dir = Path(settings.output_dir)
    refuse_other_verb(output_dir)
    begin, started = time.perf_counter(), datetime.now().astimezone().isoformat(timespec="seconds")
    with quiet_libraries():
        is_bf16 = multiplies_bf16(best_device()) if settings.bf16 is None else settings.bf16
        runs = all_runs(settings, arms, is_bf16=is_bf16)
        measure = prepare(settings, runs[0])
        with claimed(output_dir, resume=True) as directory:
            plan = _planned(settings, runs, measure)
            directory.begin(vars(settings) | MARK)
            for name in (REPORT_PICTURE, REPORT_TABLE):
                (output_dir / name).unlink(missing_ok=True)  # must not stand beside newer runs
            _say_plan(settings, plan, measure, console)
            found = _nothing_trained(settings, plan, measure, command, started)
            for results in _trained(found, measure, console):
                found = replace(found, results=results, seconds=time.perf_counter() - begin)
                write_figures(found)
            written = write_report(found)
    console.print(summary_table(found.arms(), found.ar, found.unit, settings.tokens))
    _say(console, "", *(f"  {sentence}" for sentence in found.sentences()), f"  It took {found.seconds:.0f} s.")
    _say(console, "", "[bold]Look:[/bold]", *(f"  {escape(str(path))}" for path in written))
    return found


def _planned(settings: CompareSettings, runs: Sequence[ArmRun], measure: Measure) -> list[Planned]:
    """Packs all training data, fixes every run's length, and checks the directories."""
    budget = Budget.of(settings)
    for run in runs:
        training_rows(run, measure.tokenizer)
    steps: dict[tuple[str, int | None], int] = {}
    plan = []
    for run in runs:
        # Minutes depend on the machine alone, tokens on the seed's data too.
        key = (run.arm.name, None if budget.kind == "minutes" else run.seed)
        if key not in steps:
            steps[key] = _num_steps(settings, run, runs, measure)
        planned = Planned(run, steps[key], budget)
        if not settings.overwrite:
            refuse_other_run(planned, described(planned, measure))
        plan.append(planned)
    return plan


def _num_steps(settings: CompareSettings, run: ArmRun, runs: Sequence[ArmRun], measure: Measure) -> int:
    budget = Budget.of(settings)
    if budget.kind == "steps":
        return int(budget.amount)
    if budget.kind == "tokens":
        return steps_for_tokens(budget, run, measure.tokenizer)
    others = [other.directory for other in runs if other.arm == run.arm]
    before = None if settings.overwrite else next(filter(None, map(steps_before, others)), None)
    return before or tried_steps(run, budget)


def _trained(found: Comparison, measure: Measure, console: Console) -> Iterator[list[RunResult]]:
    """Measures the untrained student, trains all runs, and yields the results so far, in the plan's order."""
    settings = found.settings
    plan = [replace(planned, start_scores=measure.start_scores(planned.run)) for planned in found.plan]
    workers = num_workers(settings, measure, len(plan))
    names = [planned.run.name for planned in plan]
    finished: dict[str, RunResult] = {}
    with ComparisonView(console, names, measure.unit, settings.tokens) as view:
        for result in train_all(plan, measure, view.on_event, workers=workers, overwrite=settings.overwrite):
            finished[f"{result.arm}-seed{result.seed}"] = result
            yield [finished[name] for name in names if name in finished]


def _nothing_trained(
    settings: CompareSettings, plan: list[Planned], measure: Measure, command: str, started: str
) -> Comparison:
    """Measures the AR model and returns a comparison without results yet."""
    return Comparison(
        settings=settings,
        plan=plan,
        results=[],
        source={
            "model_name_or_path": settings.model_name_or_path,
            "model_type": measure.source.config.model_type,
            "num_parameters": measure.source.num_parameters(),
        },
        measured={
            "while_training": measure.measured(is_final=False),
            "final": measure.measured(is_final=True),
        },
        ar=measure.ar_score(is_final=True),
        ar_while_training=measure.ar_score(is_final=False),
        unit=measure.unit,
        higher_is_better=measure.higher_is_better,
        command=command,
        started=started,
        seconds=0.0,
    )


def _say_plan(settings: CompareSettings, plan: Sequence[Planned], measure: Measure, console: Console) -> None:
    ar = measure.ar_score(is_final=True)
    quality = f"{measure.unit if ar.threshold is not None else 'exact likelihood'} {ar.quality:.3f}"
    arms = ", ".join(dict.fromkeys(planned.run.arm.name for planned in plan))
    _say(
        console,
        f"[bold]decausal compare[/bold]: {escape(arms)} from {escape(settings.model_name_or_path)}",
        f"  AR model     {measure.source.num_parameters() / 1e6:.1f} million parameters, {quality}",
        f"  each run     {plan[0].budget.sentence()}; seeds {', '.join(map(str, settings.seeds))}",
        f"  measured on  {escape(settings.measured_data)}",
    )


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
