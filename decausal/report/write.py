"""Writes a report: a self-contained page, and a JSON file with the same content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from decausal.errors import UserError
from decausal.files import RUN_PAGE, write_whole
from decausal.privacy import without_secrets
from decausal.provenance import commit, versions
from decausal.report.page import page
from decausal.report.sections import sections
from decausal.report.sources import REPORT, Found, read_run

FORMAT = 1


def write_report(found: Found, output: Path, title: str = "decausal report") -> list[Path]:
    """Writes the page, and beside it a JSON file of the same name. Returns both paths.

    Raises:
        UserError: A file cannot be written.
    """
    paths = [output, output.with_suffix(".json")]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(paths[0], page(title, sections(found)))
        write_whole(paths[1], json.dumps(as_dict(found), indent=2, ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}; name another file") from error
    return paths


def as_dict(found: Found) -> dict[str, Any]:
    """Returns a report as plain values, without secrets."""
    return {
        REPORT: FORMAT,
        "made_by": {"commit": commit(), "versions": versions()},
        "evaluations": [evaluation.as_dict() for evaluation in found.evaluations],
        "runs": [without_secrets(run.as_dict()) for run in found.runs],
        "notes": found.notes,
    }


def write_run_page(output_dir: Path) -> None:
    """Writes the page of one run into its directory, in one step."""
    run = read_run(output_dir)
    write_whole(output_dir / RUN_PAGE, page(f"Run {run.name}", sections(Found(runs=[run]))))
