"""The comparison on disk: all figures as JSON, a table and the findings as Markdown, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decausal.compare.budget import Budget
from decausal.compare.findings import (
    ArmSummary,
    Milestone,
    ParallelLoss,
    Reaching,
    Spread,
    ar_name,
    ending_sentence,
    milestones,
    parallel_losses,
    reaching,
)
from decausal.compare.plots import save_figure
from decausal.compare.records import Score
from decausal.compare.settings import SPECULATIVE, CompareSettings, Schedule
from decausal.compare.training import Planned, RunResult
from decausal.compare.view import schedule_name
from decausal.files import write_whole
from decausal.privacy import without_paths, without_secrets
from decausal.provenance import provenance
from decausal.wording import quantity

REPORT_FIGURES, REPORT_TABLE, REPORT_PICTURE = "report.json", "report.md", "report.png"


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found.

    Attributes:
        settings: The settings of the comparison.
        plan: All runs, with their settings.
        results: The runs that have finished, in the plan's order.
        source: The AR model: name, type, parameters.
        measured: What runs are measured on, while they train and at their end.
        ar: The AR model's score on what runs are measured on at their end.
        ar_while_training: The AR model's score on the data of measurements during training.
        unit: The unit of quality.
        higher_is_better: Whether higher quality is better.
        command: The command that made it.
        started: Local time, as ISO 8601 writes it.
        seconds: How long it took, without runs that were finished before.
    """

    settings: CompareSettings
    plan: Sequence[Planned]
    results: Sequence[RunResult]
    source: dict[str, Any]
    measured: dict[str, Any]
    ar: Score
    ar_while_training: Score
    unit: str
    higher_is_better: bool
    command: str
    started: str
    seconds: float

    @property
    def reference(self) -> str:
        """The arm whose best the others should reach."""
        return self.settings.reference or self.plan[0].run.arm.name

    @property
    def curve_threshold(self) -> float | None:
        """The schedule of the curves over training: the most careful that was measured."""
        return None if self.settings.eval == "nll" else max(self.settings.eval_thresholds)

    def arms(self) -> list[ArmSummary]:
        """Returns each arm over its seeds."""
        names = dict.fromkeys(result.arm for result in self.results)
        return [ArmSummary.of([result for result in self.results if result.arm == name]) for name in names]

    def reaching(self) -> list[Reaching]:
        """Returns the tokens that each arm needed for the reference's best."""
        return reaching(
            self.results,
            self.reference,
            self.curve_threshold,
            self.settings.tokens,
            higher_is_better=self.higher_is_better,
        )

    def parallel_losses(self) -> list[ParallelLoss]:
        """Returns what each arm loses when decoded in parallel."""
        return parallel_losses(self.results)

    def milestones(self) -> list[Milestone]:
        """Returns the tokens to shares of the AR model's accuracy; empty for other qualities."""
        if not self.higher_is_better:
            return []
        return milestones(self.results, self.ar_while_training, self.curve_threshold, self.settings.tokens)

    def sentences(self) -> list[str]:
        """Returns the findings in words."""
        shown = (_nearest_threshold(self.settings), SPECULATIVE)
        losses = [found for found in self.parallel_losses() if found.threshold in shown]
        return [
            *(found.sentence(self.unit) for found in self.reaching()),
            *(found.sentence() for found in losses),
            *(ending_sentence(arm, self.ar, self.unit) for arm in self.arms()),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures and what they depend on, as in `report.json`."""
        runs = {planned.run.name: planned for planned in self.plan}
        return {
            "command": self.command,
            "is_complete": len(self.results) == len(self.plan),
            "settings": asdict(self.settings),
            "started": self.started,
            "seconds": self.seconds,
            **provenance(),
            "source": self.source,
            "budget": asdict(Budget.of(self.settings)),
            "measured": self.measured,
            "quality": {"unit": self.unit, "higher_is_better": self.higher_is_better},
            "ar": {"while_training": asdict(self.ar_while_training), "final": asdict(self.ar)},
            "arms": [_arm_as_dict(arm) for arm in self.arms()],
            "reaching": [
                asdict(found)
                | {"ratios": found.ratios, "mean_ratio": found.mean_ratio, "sentence": found.sentence(self.unit)}
                for found in self.reaching()
            ],
            "milestones": [asdict(found) for found in self.milestones()],
            "parallel_losses": [asdict(found) | {"sentence": found.sentence()} for found in self.parallel_losses()],
            "runs": [_run_as_dict(result, runs[f"{result.arm}-seed{result.seed}"]) for result in self.results],
        }


def write_report(comparison: Comparison) -> list[Path]:
    """Writes `report.png`, `report.md` and `report.json` into the comparison's directory, and returns their paths."""
    output_dir = Path(comparison.settings.output_dir)
    paths = [output_dir / name for name in (REPORT_PICTURE, REPORT_TABLE, REPORT_FIGURES)]
    save_figure(
        paths[0],
        comparison.results,
        (comparison.ar_while_training, comparison.ar),
        threshold=comparison.curve_threshold,
        counted=comparison.settings.tokens,
        unit=comparison.unit,
    )
    write_whole(paths[1], _markdown(comparison))
    write_figures(comparison)
    return paths


def write_figures(comparison: Comparison) -> None:
    """Writes only `report.json`, with the results so far."""
    text = json.dumps(without_secrets(comparison.as_dict()), indent=2, ensure_ascii=False) + "\n"
    write_whole(Path(comparison.settings.output_dir, REPORT_FIGURES), text)


def _markdown(comparison: Comparison) -> str:
    unit, kind, arms = comparison.unit, comparison.settings.tokens, comparison.arms()
    thresholds = _thresholds(arms)
    heads = [schedule_name(threshold, unit) for threshold in thresholds]
    rows = [
        ["arm", f"{kind} tokens", "supervised", "generated", "steps", "seconds", *heads],
        ["---", *["---:"] * (5 + len(heads))],
        *(_row(arm, kind, _cells(arm, thresholds)) for arm in arms),
        [ar_name(comparison.ar), *[""] * 5, f"{comparison.ar.quality:.3f}", *[""] * (len(heads) - 1)],
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    facts = provenance()
    hardware = facts["hardware"]
    found = "\n".join(f"- {sentence}" for sentence in comparison.sentences())
    return f"""# Comparison of {", ".join(arm.arm for arm in arms)}

From `{without_paths(comparison.settings.model_name_or_path)}`, {Budget.of(comparison.settings).sentence()} each,
seeds {", ".join(map(str, comparison.settings.seeds))}. {unit[0].upper()}{unit[1:]} on held-out data at the end of
training, mean ± deviation over seeds; in brackets tokens per forward pass.

{table}

![Quality by training tokens, and by tokens per forward]({REPORT_PICTURE})

{found}

`{comparison.command}`, commit {facts["commit"]}, {facts["date"]}, {hardware["processor"]},
{quantity(hardware["cores"], "core")}, torch {facts["versions"]["torch"]},
transformers {facts["versions"]["transformers"]}. All figures: `{REPORT_FIGURES}`.
"""


def _thresholds(arms: Sequence[ArmSummary]) -> list[Schedule]:
    """Returns the table's columns: the schedules under which some arm was measured at the end."""
    return list(dict.fromkeys(threshold for arm in arms for threshold, _, _ in arm.final))


def _cells(arm: ArmSummary, thresholds: Sequence[Schedule]) -> list[str]:
    """Returns an arm's quality under each schedule, followed by the tokens per forward; empty if not measured."""
    cells = {
        threshold: str(quality) if speed is None else f"{quality} ({speed.mean:.2f}/fwd)"
        for threshold, quality, speed in arm.final
    }
    return [cells.get(threshold, "") for threshold in thresholds]


def _row(arm: ArmSummary, kind: str, cells: list[str]) -> list[str]:
    tokens = [f"{arm.tokens[name].mean:,.0f}" for name in (kind, "supervised", "generated")]
    return [arm.arm, *tokens, f"{arm.steps.mean:.0f}", f"{arm.seconds.mean:.1f}", *cells]


def _arm_as_dict(arm: ArmSummary) -> dict[str, Any]:
    return {
        "arm": arm.arm,
        "tokens": {name: asdict(spread) for name, spread in arm.tokens.items()},
        "steps": asdict(arm.steps),
        "seconds": asdict(arm.seconds),
        "final": [
            {"threshold": threshold, "quality": asdict(quality), "tokens_per_forward": _plain(speed)}
            for threshold, quality, speed in arm.final
        ],
    }


def _run_as_dict(result: RunResult, planned: Planned) -> dict[str, Any]:
    return {
        "arm": result.arm,
        "seed": result.seed,
        "directory": result.directory,
        "recipe": planned.run.arm.recipe,
        "overrides": planned.run.arm.overrides,
        "settings": asdict(planned.run.conversion) | planned.training,
        "measurements": [measurement.as_dict() for measurement in result.measurements],
        "final": [asdict(score) for score in result.final],
    }


def _plain(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else asdict(spread)


def _nearest_threshold(settings: CompareSettings) -> float | None:
    """Returns the parallel schedule for sentences: the one nearest to the sampler's default."""
    below = [threshold for threshold in settings.thresholds if threshold < 1]
    return min(below, key=lambda threshold: abs(threshold - 0.9)) if below else None
