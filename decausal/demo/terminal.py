"""The demo in the terminal: bars and a table that fill up while the runs train. Elsewhere it prints plain lines."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from decausal.demo.history import MEASURES, Measurement, best
from decausal.demo.output import ARM_NAMES
from decausal.live import LiveView
from decausal.wording import quantity

LABELS = {"plain": "plain denoising", "aligned": "REPR-ALIGN"}
_COLUMN_LABELS = {"plain": "plain", "aligned": "REPR-ALIGN"}
COLOURS = {"plain": "dark_orange", "aligned": "dodger_blue1"}
_LINES_AROUND_TABLE = 9  # title, rules, bars and a spare line


class TrainingView(LiveView):
    """Shows both runs in one live display: a bar each, and held-out figures side by side.

    Args:
        console: Where to draw. If it is not a terminal, each measurement is printed as one line instead.
        max_steps: Steps of each run.
    """

    def __init__(self, console: Console, max_steps: int) -> None:
        super().__init__(console, get_renderable=self._frame, refresh_per_second=4, transient=True)
        self.max_steps = max_steps
        self.measurements: dict[str, list[Measurement]] = {arm: [] for arm in ARM_NAMES}
        self._progress = Progress(
            TextColumn("{task.description:>16}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> TrainingView:
        for arm in ARM_NAMES:
            description = f"[{COLOURS[arm]}]{LABELS[arm]}"
            self._tasks[arm] = self._progress.add_task(description, total=self.max_steps, start=False, loss="")
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if self.console.is_terminal and error is None:
            self.console.print(measurement_table(self.measurements))

    def begin(self, arm: str) -> None:
        """Shows that a run begins."""
        if self._live is not None:
            self._progress.start_task(self._tasks[arm])
        else:
            self._say(f"{LABELS[arm]}: {quantity(self.max_steps, 'step')}")

    def step(self, arm: str, step: int, token_loss: float) -> None:
        """Moves a run's bar."""
        if self._live is not None:
            self._progress.update(self._tasks[arm], completed=step, loss=f"training loss {token_loss:.3f}")

    def measured(self, arm: str, measurement: Measurement) -> None:
        """Adds a line to the table."""
        self.measurements[arm].append(measurement)
        if self._live is None:
            self._say(
                f"  step {measurement.step:4d}/{self.max_steps}  {measurement.seconds:6.1f} s"
                f"  masked cross-entropy {measurement.masked_cross_entropy:.4f}"
                f"  NELBO {measurement.nelbo_per_token:.4f}"
            )

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _frame(self) -> Group:
        most_rows = max(self.console.height - _LINES_AROUND_TABLE, 3)
        return Group(measurement_table(self.measurements, most_rows), self._progress)


def measurement_table(measurements: dict[str, list[Measurement]], most_rows: int | None = None) -> Table:
    """Returns both runs' held-out figures side by side. The best of each column is bold.

    Args:
        measurements: The measurements of each run.
        most_rows: The most rows of the run in progress, its latest.
    """
    table = Table(title="On held-out text, in nats: lower is better", title_justify="left", title_style="bold")
    table.add_column("step", justify="right")
    for arm in ARM_NAMES:
        for header in ("masked CE", "NELBO", "seconds"):
            table.add_column(f"{_COLUMN_LABELS[arm]}\n{header}", justify="right", style=COLOURS[arm])
    by_step = {arm: {found.step: found for found in measurements[arm]} for arm in ARM_NAMES}
    steps = sorted({step for found in by_step.values() for step in found})
    for step in _window(steps, [max(found) for found in by_step.values() if found], most_rows):
        cells = [cell for arm in ARM_NAMES for cell in _cells(by_step[arm].get(step), measurements[arm])]
        table.add_row(str(step), *cells)
    return table


def cosine_table(before: Sequence[float], plain: Sequence[float], aligned: Sequence[float]) -> Table:
    """Returns the cosine to the AR model of each hidden state, before training and after either run."""
    table = Table(title="Cosine to the AR model's hidden states", title_justify="left", title_style="bold")
    table.add_column("state")
    table.add_column("before", justify="right")
    for arm in ARM_NAMES:
        table.add_column(f"after {LABELS[arm]}", justify="right", style=COLOURS[arm])
    for index, cosines in enumerate(zip(before, plain, aligned, strict=True)):
        table.add_row(state_name(index, len(before)), *(f"{cosine:.3f}" for cosine in cosines))
    return table


def state_name(index: int, num_states: int) -> str:
    """Names a hidden state: 0 is the embedding output, the last is the one after the final norm."""
    if index == 0:
        return "embeddings"
    return "final norm" if index == num_states - 1 else f"layer {index}"


def _window(steps: list[int], latest_of_arms: list[int], most_rows: int | None) -> list[int]:
    if most_rows is None or len(steps) <= most_rows:
        return steps
    end = steps.index(latest_of_arms[-1]) + 1
    start = max(end - most_rows, 0)
    return steps[start : start + most_rows]


def _cells(measurement: Measurement | None, of_arm: list[Measurement]) -> list[str]:
    if measurement is None:
        return ["", "", ""]
    figures = []
    for measure in MEASURES:
        figure = f"{getattr(measurement, measure):.3f}"
        figures.append(f"[bold]{figure}[/bold]" if len(of_arm) > 1 and measurement is best(of_arm, measure) else figure)
    return [*figures, f"{measurement.seconds:.1f}"]
