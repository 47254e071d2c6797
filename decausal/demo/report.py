"""The report on disk: figures as JSON, plots as PNG, and one page that holds everything it shows."""

from __future__ import annotations

import json
from pathlib import Path

from decausal.demo.output import REPORT_FIGURES, REPORT_PAGE, REPORT_PICTURE
from decausal.demo.page import page
from decausal.demo.plots import Curves, save_picture
from decausal.demo.result import DemoResult


def write_report(result: DemoResult) -> list[Path]:
    """Writes `report.html`, `report.png` and `report.json` into the demo's directory, and returns their paths."""
    output_dir = Path(result.settings.output_dir)
    paths = [output_dir / name for name in (REPORT_PAGE, REPORT_PICTURE, REPORT_FIGURES)]
    record = result.as_dict()
    curves = Curves(
        measurements={name: arm.measurements for name, arm in result.arms.items()},
        crossings=result.crossings,
        cosines=result.cosines,
        ar_nll_per_token=result.ar.nll_per_token,
    )
    paths[0].write_text(page(result, record, curves), encoding="utf-8")
    save_picture(paths[1], curves)
    paths[2].write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths
