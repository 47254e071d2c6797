"""Checks a demo's paths before torch and transformers are imported."""

from __future__ import annotations

from pathlib import Path

from decausal.data.sources import refuse_missing
from decausal.demo.output import refuse_foreign_files
from decausal.demo.settings import DemoSettings
from decausal.models.names import check_source
from decausal.training.run_directory import refuse_taken


def check_inputs(settings: DemoSettings) -> None:
    """Refuses early what `run_demo` would refuse after its slow import.

    Raises:
        UserError: No such model or data, or the directory holds something that no demo made.
    """
    output_dir = Path(settings.output_dir)
    refuse_foreign_files(output_dir)
    refuse_taken(output_dir, resume=True)
    check_source(settings.model_name_or_path)
    refuse_missing(settings.data)
    refuse_missing(settings.eval_data)
