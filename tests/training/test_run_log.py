"""A run's log and page: written while it goes, and continued by a resumed run as if it had never stopped."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.runs import run, save_source, write_text


class Looks(TrainerCallback):
    """Reads the page after each evaluation."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir, self.pages = output_dir, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        page = self.output_dir / "report.html"
        self.pages.append(page.read_text() if page.exists() else "")


def entries(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def figures(output_dir: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries(output_dir)]


def test_the_page_is_drawn_anew_at_each_evaluation_and_the_log_is_continued(tmp_path: Path) -> None:
    source, data = save_source(tmp_path / "source"), write_text(tmp_path / "text.jsonl")
    options: dict[str, Any] = {"eval_data": str(data), "eval_rows": 2, "eval_steps": 2, "eval_strategy": "steps"}
    looks = Looks(tmp_path / "whole")
    run(source, data, tmp_path / "whole", callbacks=[looks], **options)
    assert looks.pages[0] == ""
    assert "<svg" in looks.pages[2]
    assert looks.pages[2] != (tmp_path / "whole" / "report.html").read_text()
    logged = entries(tmp_path / "whole")
    assert [entry["step"] for entry in logged if "eval_nelbo_per_token" in entry] == [2, 4]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3, 4]
    assert all(later["seconds"] >= sooner["seconds"] for sooner, later in pairwise(logged))
    assert logged[-1]["tokens"] > logged[0]["tokens"] > 0

    run(source, data, tmp_path / "parts", **options)
    log = tmp_path / "parts" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "lo')  # the line that a killed run was writing
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    run(source, data, tmp_path / "parts", resume_from_checkpoint=str(checkpoint), **options)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
