"""The doctor's findings on a model by name, and as a table."""

from __future__ import annotations

import torch
from rich.table import Table

from decausal.models.adapt import load_source, source_config
from decausal.models.architecture import refusal
from decausal.models.checkpoint import load_converted
from decausal.models.doctor import Probe, architecture_probe, examine, shown, usable
from decausal.models.names import is_converted


def examine_path(
    model_name_or_path: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> list[Probe]:
    """Examines an AR model (as `load_source` takes it) or a converted one (with a decausal.json).

    A PEFT adapter is examined after merging it into its base. The probes run in `dtype`.

    Raises:
        UserError: There is no such model or it cannot be read. A refused architecture is a finding, not an error.
    """
    if is_converted(model_name_or_path, revision):
        converted = load_converted(model_name_or_path, dtype, revision=revision)
        return examine(converted.model, converted.tokenizer, converted.facts)
    config = source_config(model_name_or_path, revision)
    if refusal(config) is not None:
        return [architecture_probe(config)]
    model, tokenizer = load_source(model_name_or_path, dtype=dtype, revision=revision, merge_adapter=True)
    return examine(model, tokenizer)


def probes_as_table(title: str, probes: list[Probe]) -> Table:
    """Returns the findings for a terminal, with what each failure means and a verdict."""
    table = Table(title=title, caption="usable" if usable(probes) else "not usable", caption_justify="left")
    table.add_column("probe")
    table.add_column("")
    table.add_column("measured", overflow="fold")
    table.add_column("what it means", overflow="fold")
    for probe in probes:
        failed = "[red]fails[/red]" if probe.required else "[yellow]note[/yellow]"
        table.add_row(
            probe.name,
            "[green]ok[/green]" if probe.passed else failed,
            shown(probe),
            "" if probe.passed else probe.explanation,
        )
    return table
