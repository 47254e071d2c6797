"""Benchmark figures as tables."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.table import Table

from decausal.provenance import provenance

# Wide enough for the tables where the output is a file.
console = Console(highlight=False, width=None if Console().is_terminal else 120)


def circumstances() -> dict[str, Any]:
    """Returns date, commit, hardware and versions, and the command as it was given."""
    return provenance() | {"command": shlex.join(["python", *sys.orig_argv[1:]])}


def print_header(outcome: dict[str, Any]) -> None:
    """Prints one line per fact of where the figures come from."""
    for name in ("hardware", "versions", "commit", "command", "date"):
        value = outcome[name]
        text = ", ".join(f"{key} {fact}" for key, fact in value.items()) if isinstance(value, dict) else value
        console.print(f"[bold]{name:>9}[/]  {text}", soft_wrap=True)


def print_by_batch_size(
    title: str, records: Sequence[dict[str, Any]], columns: Mapping[str, Callable[[Any], str]]
) -> None:
    """Prints a table of cases, a section for each batch size.

    Args:
        title: The heading of the table.
        records: One for each batch size and case, in order.
        columns: By a column's heading, what it shows of a record.
    """
    table = Table(title=title, title_justify="left")
    for heading in ("batch", "case", *columns):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for record, after in zip_longest(records, records[1:]):
        figures = (show(record) for show in columns.values())
        is_last = after is None or after["batch_size"] != record["batch_size"]
        table.add_row(str(record["batch_size"]), record["case"], *figures, end_section=is_last)
    console.print(table)


def print_steps(model_name: str, figures: dict[str, Any]) -> None:
    """Prints a table of steps, and the time that data takes beside them."""
    precision = "bf16 autocast" if figures["bf16"] else "fp32"
    rows = f"{figures['batch_size']} student rows x {figures['length']} tokens, {figures['documents']} document(s) each"
    table = Table(title=f"{model_name}: {rows}, {precision}", title_justify="left")
    for heading in ("case", "ms", "+opt.", "ratio", "+opt.", "floor", "target", "MB", "ratio"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    table.add_column("target", justify="right")
    table.add_column("waits", justify="right")
    for name, case in figures["cases"].items():
        table.add_row(
            name,
            f"{case['seconds'] * 1e3:.1f}",
            f"{case['seconds_with_optimizer'] * 1e3:.1f}",
            f"{case['ratio']:.3f}",
            f"{case['ratio_with_optimizer']:.3f}",
            f"{case['floor']:.3f}",
            _verdict(case["ratio"], case["time_target"]),
            f"{case['memory_bytes'] / 1e6:.1f}",
            f"{case['memory_ratio']:.3f}",
            _verdict(case["memory_ratio"], case["memory_target"]),
            "" if case["host_waits"] is None else str(case["host_waits"]),
        )
    console.print(table)
    share = figures["data_seconds"] / figures["cases"]["plain"]["seconds"] if "plain" in figures["cases"] else None
    of_step = "" if share is None else f", {share:.2%} of a plain step"
    console.print(f"data: {figures['data_seconds'] * 1e3:.2f} ms per batch in one process{of_step}\n")


def print_loss_memory(figures: dict[str, float], vocab_size: int) -> None:
    """Prints the peak memory of the token loss and of its naive form."""
    console.print(
        f"loss memory at V = {vocab_size:,}, {figures['tokens']} tokens of width {figures['width']}, half of them "
        f"targets, gradients apart: {figures['ours'] / 1e6:.0f} MB, naive {figures['naive'] / 1e6:.0f} MB, "
        f"ratio {figures['ratio']:.3f}, target {_verdict(figures['ratio'], figures['target'])}"
    )


def _verdict(value: float, target: float | None) -> str:
    if target is None:
        return ""
    return f"[green]{target:.2f} ok[/]" if value <= target else f"[red]{target:.2f} over[/]"
