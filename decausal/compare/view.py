"""A comparison in the terminal: bars and a table that fill up as runs train. Elsewhere it prints plain lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from decausal.compare.budget_callback import Event
from decausal.compare.findings import ArmSummary, ar_name
from decausal.compare.records import Measurement, Score
from decausal.compare.settings import SPECULATIVE, STATIC, Schedule
from decausal.live import LiveView


class ComparisonView(LiveView):
    """Shows the runs in one live display: a bar for each running one, and the latest figures of all.

    Args:
        console: Where to draw. If it is not a terminal, each measurement is printed as one line instead.
        names: Names of all runs, in the order of the table.
        unit: The unit of quality.
        counted: The training tokens that are shown.
    """

    def __init__(self, console: Console, names: Sequence[str], unit: str, counted: str) -> None:
        super().__init__(console, get_renderable=self._frame, refresh_per_second=4, transient=True)
        self.names, self.unit, self.counted = names, unit, counted
        self.latest: dict[str, Measurement] = {}
        self._progress = Progress(
            TextColumn("{task.description:>24}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def on_event(self, event: Event) -> None:
        """Shows an event of a run."""
        if event.measurement is not None:
            self.latest[event.run] = event.measurement
        if self._live is not None:
            self._move_bar(event)
        elif event.measurement is not None:
            self.console.print(self._line(event.run, event.measurement), markup=False, highlight=False, soft_wrap=True)

    def _move_bar(self, event: Event) -> None:
        if event.kind == "began":
            self._tasks[event.run] = self._progress.add_task(escape(event.run), total=1.0, loss="")
        elif event.kind == "ended":
            self._progress.remove_task(self._tasks.pop(event.run))
        else:
            shown = {} if event.loss is None else {"loss": f"loss {event.loss:.3f}"}
            self._progress.update(self._tasks[event.run], completed=min(event.progress, 1.0), **shown)

    def _line(self, name: str, measurement: Measurement) -> str:
        scores = "  ".join(_described(score, self.unit) for score in measurement.scores)
        tokens = getattr(measurement.tokens, self.counted)
        return (
            f"  {name:24s} {measurement.progress:4.0%}  step {measurement.step:5d}  {tokens:9,d} tokens  "
            f"{measurement.seconds:6.1f} s  {scores}"
        )

    def _frame(self) -> Group:
        table = Table(title=f"Held-out {self.unit}, latest", title_justify="left", title_style="bold")
        table.add_column("run")
        for header in ("budget", "steps", f"{self.counted} tokens", "seconds", self.unit):
            table.add_column(header, justify="right")
        for name in self.names:
            measurement = self.latest.get(name)
            if measurement is None:
                continue
            cells = [
                f"{measurement.progress:.0%}",
                str(measurement.step),
                f"{getattr(measurement.tokens, self.counted):,}",
                f"{measurement.seconds:.1f}",
                "  ".join(_described(score, "") for score in measurement.scores),
            ]
            table.add_row(escape(name), *cells)
        return Group(table, self._progress)


def summary_table(arms: Sequence[ArmSummary], ar: Score, unit: str, counted: str) -> Table:
    """Returns all arms' final means and deviations over seeds, a line for each schedule. The AR model comes last."""
    title = f"At the end: {unit} on held-out data, mean ± deviation over seeds"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("arm", no_wrap=True)
    for header in (f"{counted} tokens", "steps", "seconds"):
        table.add_column(header, justify="right")
    for header in ("decoding", unit):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("tokens per forward", justify="right")
    for arm in arms:
        heads = [escape(arm.arm), *(f"{value.mean:,.0f}" for value in (arm.tokens[counted], arm.steps, arm.seconds))]
        for threshold, quality, speed in arm.final:
            per_forward = "" if speed is None else f"{speed.mean:.2f}"
            table.add_row(*heads, schedule_name(threshold, ""), str(quality), per_forward)
            heads = [""] * len(heads)
        table.add_section()
    table.add_row(ar_name(ar), *[""] * 4, f"{ar.quality:.3f}")
    return table


def schedule_name(threshold: Schedule, unit: str) -> str:
    """Names a decoding schedule in a table's head."""
    if threshold is None:
        return unit
    return {STATIC: "static", SPECULATIVE: "speculative"}.get(threshold) or f"above {threshold:g}"


def _described(score: Score, unit: str) -> str:
    if score.threshold is None:
        return f"{unit} {score.quality:.4f}".strip()
    speed = "" if score.tokens_per_forward is None else f" ({score.tokens_per_forward:.2f}/fwd)"
    return f"{unit} {schedule_name(score.threshold, '')} {score.quality:.3f}{speed}".strip()
