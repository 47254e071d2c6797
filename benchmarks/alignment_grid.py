"""When does alignment pay? Converts the embedded model many times and compares each way of aligning with none.

For each seed, one plain run and one run per variant, equal in all else; each line says how low the held-out masked
cross-entropy and NELBO came, and after what share of the plain run's steps its best was reached.

    python benchmarks/alignment_grid.py --variants w1,w3-linear,w10 --seeds 0,1,2 --data_fraction 0.01
    python benchmarks/alignment_grid.py --variants "align_weight=3 align_layers=upper"     # any settings of convert
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import transformers
from rich.console import Console
from rich.table import Table

from decausal.config import coerce
from decausal.demo.arms import MeasuringCallback, arm_settings
from decausal.demo.held_out import HeldOut, prepare
from decausal.demo.history import Crossing, Measurement, crossing
from decausal.demo.settings import DemoSettings
from decausal.devices import is_fast_in_bf16
from decausal.provenance import provenance
from decausal.training.convert import convert
from decausal.training.settings import ConversionSettings

VARIANTS = {
    "w1": "align_weight=1",
    "w3": "align_weight=3",
    "w10": "align_weight=10",
    "w30": "align_weight=30",
    "w1-linear": "align_weight=1 align_schedule=linear",
    "w3-linear": "align_weight=3 align_schedule=linear",
    "w10-linear": "align_weight=10 align_schedule=linear",
    "w3-lower": "align_weight=3 align_schedule=linear align_layers=lower",
    "w3-middle": "align_weight=3 align_schedule=linear align_layers=middle",
    "w3-upper": "align_weight=3 align_schedule=linear align_layers=upper",
    "w3-all-positions": "align_weight=3 align_schedule=linear align_positions=all",
    "w3-l2": "align_weight=3 align_schedule=linear align_distance=l2",
}


class _NoView:
    """Stands where the demo shows its progress."""

    def step(self, *_: Any) -> None: ...

    def measured(self, *_: Any) -> None: ...


def main() -> None:
    flags = _flags()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    demo = DemoSettings(**{name: value for name, value in vars(flags).items() if name in _DEMO_FLAGS})
    is_bf16 = is_fast_in_bf16()
    conversion, _ = arm_settings(demo, "aligned", is_bf16=is_bf16)
    held_out = prepare(
        conversion,
        demo.eval_data,
        num_rows=demo.eval_rows,
        samples_per_row=demo.eval_samples,
        is_bf16=is_bf16,
    )
    found: dict[str, list[Crossing]] = {}
    histories: dict[str, list[list[float]]] = {}
    for seed in (int(seed) for seed in flags.seeds.split(",")):
        of_seed = replace(demo, seed=seed)
        plain = _run(of_seed, "align_weight=0", held_out, is_bf16)
        histories.setdefault("plain", []).append([measured.masked_cross_entropy for measured in plain])
        for variant in flags.variants.split(","):
            aligned = _run(of_seed, VARIANTS.get(variant, variant), held_out, is_bf16)
            histories.setdefault(variant, []).append([measured.masked_cross_entropy for measured in aligned])
            for measure in ("masked_cross_entropy", "nelbo_per_token"):
                found.setdefault(f"{variant} {measure}", []).append(crossing(plain, aligned, measure))
            Console(stderr=True).print(
                f"seed {seed} {variant}: {found[f'{variant} masked_cross_entropy'][-1].sentence()}"
            )
    Console().print(_table(found, flags))
    if flags.json:
        record = {
            "command": " ".join(sys.orig_argv[1:]),
            **provenance(),
            "settings": vars(flags),
            "crossings": {name: [vars(one) for one in of_name] for name, of_name in found.items()},
            "masked_cross_entropy": histories,
        }
        Path(flags.json).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _run(demo: DemoSettings, changes: str, held_out: HeldOut, is_bf16: bool) -> list[Measurement]:
    conversion, training = arm_settings(demo, "aligned", is_bf16=is_bf16)
    hints = get_type_hints(ConversionSettings)
    pairs = (change.partition("=") for change in changes.split())
    conversion = replace(conversion, **{name: coerce(value, hints[name], name) for name, _, value in pairs})
    recorder = MeasuringCallback("aligned", held_out.likelihood, _NoView())
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        training["output_dir"] = str(Path(folder, "run"))
        with contextlib.redirect_stdout(nowhere):
            convert(conversion, training, callbacks=[recorder], measure=recorder.measure)
    return recorder.measurements


def _table(found: dict[str, list[Crossing]], flags: argparse.Namespace) -> Table:
    facts = provenance()
    title = f"{facts['date']}, commit {facts['commit']}, {facts['hardware']['processor']}, seeds {flags.seeds}"
    table = Table(title=title)
    for column in ("variant", "measure", "plain best", "aligned best", "difference", "reached in x of plain's steps"):
        table.add_column(column)
    for name, crossings in found.items():
        variant, _, measure = name.rpartition(" ")
        shares = [one.aligned_step / one.plain_step if one.aligned_step else None for one in crossings]
        table.add_row(
            variant,
            measure,
            _listed(one.plain_best for one in crossings),
            _listed(one.aligned_best for one in crossings),
            f"{statistics.mean(one.aligned_best - one.plain_best for one in crossings):+.4f}",
            " ".join("never" if share is None else f"{share:.2f}" for share in shares),
        )
    return table


def _listed(values: Any) -> str:
    return " ".join(f"{value:.3f}" for value in values)


_DEMO_FLAGS = {
    "model_name_or_path": str,
    "data_fraction": float,
    "max_steps": int,
    "per_device_train_batch_size": int,
    "max_length": int,
    "learning_rate": float,
    "eval_every": int,
    "eval_rows": int,
    "eval_samples": int,
}


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, or settings of convert")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--json", help="write all figures to this file")
    for name, kind in _DEMO_FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, default=getattr(DemoSettings(), name))
    return parser.parse_args()


if __name__ == "__main__":
    main()
