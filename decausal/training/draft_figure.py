"""Records how good a run's drafts are: a line in a file for each measurement, and a figure of all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decausal.training.step_records import keep_records

DRAFTS_FILE = "drafts.jsonl"
FIGURE_FILE = "drafts.png"
_ACCURACY, _PER_PASS = "eval_draft_accuracy_", "eval_tokens_per_pass"


def keep_drafts(output_dir: Path, logs: Mapping[str, float], step: int, num_tokens: int) -> None:
    """Adds a measurement to the run's file, and draws the figure again.

    Args:
        output_dir: The run's directory.
        logs: What was logged, see `DraftFigures.as_logs`.
        step: The optimizer step.
        num_tokens: Training tokens so far.
    """
    places = sorted(int(name.removeprefix(_ACCURACY)) for name in logs if name.startswith(_ACCURACY))
    record = {
        "step": step,
        "num_tokens": num_tokens,
        "accuracy": [logs[f"{_ACCURACY}{place}"] for place in places],
        "tokens_per_pass": logs[_PER_PASS],
    }
    save_draft_figure(output_dir / FIGURE_FILE, keep_records(output_dir / DRAFTS_FILE, [record], step))


def save_draft_figure(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Draws measurements as PNG: accuracy by place, a line for each, and tokens per pass by training tokens.

    Args:
        path: The file to write, in one step.
        records: Measurements in the order of the run.
    """
    from matplotlib import colormaps  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    from decausal.reporting import LIGHT, style

    figure = Figure(figsize=(10.0, 4.0), layout="constrained", facecolor=LIGHT.background)
    by_place, by_tokens = figure.subplots(1, 2)
    for number, record in enumerate(records, start=1):
        places = range(1, len(record["accuracy"]) + 1)
        colour = colormaps["Blues"](0.2 + 0.7 * number / len(records))
        is_last = number == len(records)
        label = f"{record['num_tokens']:,} tokens" if is_last or number == 1 else None
        by_place.plot(places, record["accuracy"], color=colour, marker="o", label=label)
    by_place.set_title("Drafts that are right, if those before are")
    by_place.set_xlabel("place of the draft")
    by_place.set_ylim(0, 1)
    by_place.set_xticks(range(1, len(records[-1]["accuracy"]) + 1))
    by_place.legend(frameon=False)
    counts, per_pass = zip(*((record["num_tokens"], record["tokens_per_pass"]) for record in records), strict=True)
    by_tokens.plot(counts, per_pass, color="#0072b2", marker="o")
    by_tokens.axhline(1.0, color=LIGHT.grid, linestyle="--")  # the AR model without drafts
    by_tokens.set_title("Tokens per pass")
    by_tokens.set_xlabel("training tokens")
    by_tokens.set_xlim(left=0)
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k instead of 20000
    for axes in (by_place, by_tokens):
        style(axes, LIGHT)
    partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        figure.savefig(partial, format="png", dpi=150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
