"""A comparison from beginning to end: check all arms, measure the AR model, train what is missing, report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
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
from decausal.reporting.environment import quiet_libraries
from decausal.training.run_directory import claimed


def run_compare(
    settings: CompareSettings, arms: Sequence[Arm], console: Console | None = None, command: str = ""
) -> Comparison:
    """Trains every arm with every seed from the same AR model and budget, measures all alike, and reports.

    Runs that have finished are not trained again, and one that was killed goes on from its last measurement.

    Args:
        settings: what to compare, on what, for how long.
        arms: see `decausal.compare.arms.read_arms`.
        console: where to tell of it; the standard output by default.
        command: what was typed, for the report.

    Returns:
        All that was found. `output_dir` then holds a converted model for each run, and the report.

    Raises:
        UserError: as `decausal.training.convert.convert`, or arms that cannot be compared, or a directory that holds
            something else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("decausal compare runs in one process: start it without accelerate launch or torchrun")
    console = console or Console(file=sys.stdout)
    output_dir = Path(settings.output_dir)
    refuse_other_verb(output_dir)
    with quiet_libraries():
        comparison = _Comparison(settings, arms, console, command)
        with claimed(output_dir, resume=True) as directory:
            comparison.plan_runs()
            directory.begin(vars(settings) | MARK)
            for name in (REPORT_PICTURE, REPORT_TABLE):
                (output_dir / name).unlink(missing_ok=True)  # must not stand beside newer runs
            found = comparison.train()
            written = write_report(found)
    console.print(summary_table(found.arms(), found.ar, found.unit, settings.tokens))
    _say(console, "", *(f"  {sentence}" for sentence in found.sentences()), f"  It took {found.seconds:.0f} s.")
    _say(console, "", "[bold]Look:[/bold]", *(f"  {escape(str(path))}" for path in written))
    return found


class _Comparison:
    """The parts of a comparison in their order. Making one loads the model and tells all bad input but bad directories.

    Attributes:
        measure: what all runs are measured with.
        plan: all runs, a seed of each arm before the next seed.
    """

    def __init__(self, settings: CompareSettings, arms: Sequence[Arm], console: Console, command: str) -> None:
        self.settings, self.console, self.command = settings, console, command
        self.clock_start = time.perf_counter()
        self.started = datetime.now().astimezone().isoformat(timespec="seconds")
        is_bf16 = multiplies_bf16(best_device()) if settings.bf16 is None else settings.bf16
        self.runs = all_runs(settings, arms, is_bf16=is_bf16)
        self.measure: Measure = prepare(settings, self.runs[0])
        self.plan: list[Planned] = []

    def plan_runs(self) -> None:
        """Packs all training data, fixes every run's length, and checks the directories."""
        budget = Budget.of(self.settings)
        for run in self.runs:
            training_rows(run, self.measure.tokenizer)
        steps: dict[tuple[str, int | None], int] = {}
        for run in self.runs:
            # minutes depend on the machine alone, tokens on the seed's data too
            key = (run.arm.name, None if budget.kind == "minutes" else run.seed)
            if key not in steps:
                steps[key] = self._steps(run, budget)
            planned = Planned(run, steps[key], budget)
            if not self.settings.overwrite:
                refuse_other_run(planned, described(planned, self.measure))
            self.plan.append(planned)

    def train(self) -> Comparison:
        """Measures the AR model and the untrained student, then trains all runs."""
        self._tell_plan()
        self.plan = [
            Planned(planned.run, planned.max_steps, planned.budget, self.measure.start_scores(planned.run))
            for planned in self.plan
        ]
        finished: dict[str, RunResult] = {}
        workers = num_workers(self.settings, self.measure, len(self.plan))
        view = ComparisonView(
            self.console, [planned.run.name for planned in self.plan], self.measure.unit, self.settings.tokens
        )
        with view:
            for result in train_all(
                self.plan, self.measure, view.tell, workers=workers, overwrite=self.settings.overwrite
            ):
                finished[f"{result.arm}-seed{result.seed}"] = result
                write_figures(self._found(finished))
        return self._found(finished)

    def _steps(self, run: ArmRun, budget: Budget) -> int:
        if budget.kind == "steps":
            return int(budget.amount)
        if budget.kind == "tokens":
            return steps_for_tokens(budget, run, self.measure.tokenizer)
        others = [other.directory for other in self.runs if other.arm == run.arm]
        before = None if self.settings.overwrite else next(filter(None, map(steps_before, others)), None)
        return before or tried_steps(run, budget)

    def _found(self, finished: dict[str, RunResult]) -> Comparison:
        config = self.measure.source.config
        return Comparison(
            settings=self.settings,
            plan=self.plan,
            results=[finished[planned.run.name] for planned in self.plan if planned.run.name in finished],
            source={
                "model_name_or_path": self.settings.model_name_or_path,
                "model_type": config.model_type,
                "num_parameters": self.measure.source.num_parameters(),
            },
            measured={
                "while_training": self.measure.measured(is_final=False),
                "final": self.measure.measured(is_final=True),
            },
            ar=self.measure.ar_score(is_final=True),
            ar_while_training=self.measure.ar_score(is_final=False),
            unit=self.measure.unit,
            higher_is_better=self.measure.higher_is_better,
            command=self.command,
            started=self.started,
            seconds=time.perf_counter() - self.clock_start,
        )

    def _tell_plan(self) -> None:
        ar = self.measure.ar_score(is_final=True)
        quality = f"{self.measure.unit if ar.threshold is not None else 'exact likelihood'} {ar.quality:.3f}"
        arms = ", ".join(dict.fromkeys(planned.run.arm.name for planned in self.plan))
        _say(
            self.console,
            f"[bold]decausal compare[/bold]: {escape(arms)} from {escape(self.settings.model_name_or_path)}",
            f"  AR model     {self.measure.source.num_parameters() / 1e6:.1f} million parameters, {quality}",
            f"  each run     {self.plan[0].budget.sentence()}; seeds {', '.join(map(str, self.settings.seeds))}",
            f"  measured on  {escape(self.settings.measured_data)}",
        )


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
