"""What every training step and decoding pass would have a GPU do, seen where there is none: before the first hour.

python benchmarks/device_preflight.py --rows 4 --length 4096

Steps and passes are the library's own. They run on tensors without numbers: on `meta`, and passes and the forward half
of steps also on tensors that claim to be on CUDA, if there is a C++ compiler. A line ends with what was wrong: tensors
of several devices, or numbers that the host wants.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from counting import OneDevice
from fake_cuda import CUDA, fake_cuda, lacking
from models import build
from paper_steps import KINDS, META, PaperStep, block_pass, verified_pass
from report import circumstances, print_header

from decausal.training.planning.kernels import counted
from decausal.training.planning.tally import Tally

HEAD = "| step or pass | kernels | GB read and written | GB at most | copies and waits |\n|" + "---|" * 5


@dataclass(frozen=True)
class Check:
    """A step or a pass.

    Attributes:
        name: Its name.
        is_step: Whether it has a backward pass, which is made on `meta` alone.
        tally: Runs it on a device, in `OneDevice`, and counts.
    """

    name: str
    is_step: bool
    tally: Callable[[torch.device], Tally]


def checks(args: argparse.Namespace) -> list[Check]:
    """Every kind of step, and passes of both engines over few and many rows."""

    def step(name: str, kind: str, **options: Any) -> Check:
        def tally(device: torch.device) -> Tally:
            sizes = {"rows": args.rows, "length": args.length}
            paper = PaperStep(KINDS[kind], args.model, device=device, **sizes, **options)
            return paper.tally(is_trained=device == META, inside=OneDevice(device))

        return Check(name, True, tally)

    def decoding(name: str, make: Callable[..., Callable[[], None]], num_rows: int) -> Check:
        def tally(device: torch.device) -> Tally:
            model = build(args.model, device, torch.bfloat16)
            one_pass = make(model, num_rows=num_rows, num_keys=args.keys, device=device)
            with OneDevice(device):
                return counted(one_pass)

        return Check(f"{name}, {num_rows} row{'s' * (num_rows > 1)}, {args.keys:,} keys", False, tally)

    by_attention = {"dense mask": False, "FlexAttention": True}
    found = [step(f"plain, packed, {name}", "plain", documents=4, is_flex=flex) for name, flex in by_attention.items()]
    for kind in KINDS:
        if KINDS[kind].block_size is None:
            found.append(step(kind, kind))
        else:
            found += [step(f"{kind}, {name}", kind, is_flex=flex) for name, flex in by_attention.items()]
    for num_rows in (1, 32):
        found += [decoding("block decoding", block_pass, num_rows), decoding("verified", verified_pass, num_rows)]
    return found


def outcome_of(check: Check, can_claim: bool) -> dict[str, Any]:
    """Returns a step's or pass's figures, or what was wrong."""
    found: dict[str, Any] = {"name": check.name, "device": "claimed CUDA" if can_claim else "meta"}
    tally = None
    try:
        if can_claim:
            with fake_cuda(torch.bfloat16 if check.is_step else None):
                tally = check.tally(CUDA)
        if tally is None or check.is_step:
            tally = check.tally(META)
    except (AssertionError, RuntimeError) as error:
        return found | {"wrong": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    return found | {
        "wrong": "",
        "kernels": tally.kernels.total(),
        "bytes": tally.num_bytes + tally.matrix_bytes,
        "peak_bytes": tally.peak_bytes,
        "kernels_by_name": dict(tally.kernels),
    }


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    if found["wrong"]:
        return f"| {found['name']} | | | | **{found['wrong']}** |"
    figures = f"{found['kernels']:,} | {found['bytes'] / 1e9:,.1f} | {found['peak_bytes'] / 1e9:.2f}"
    return f"| {found['name']} | {figures} | none |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b", help="a shape; see models.py")
    parser.add_argument("--rows", type=int, default=4, help="rows that the student reads, even")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--keys", type=int, default=1024, help="keys of a decoding pass")
    parser.add_argument("--only", nargs="+", default=[""], help="checks whose names begin so")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    outcome: dict[str, Any] = circumstances()
    print_header(outcome)
    reason = lacking()
    if reason is not None:
        print(f"all on meta, since no tensors claim to be on CUDA: {reason}")
    print(f"\n{HEAD}")
    outcome["checks"] = []
    for check in checks(args):
        if check.name.startswith(tuple(args.only)):
            found = outcome_of(check, can_claim=reason is None)
            outcome["checks"].append(found)
            print(line(found), flush=True)
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2) + "\n")
    return any(found["wrong"] for found in outcome["checks"])


if __name__ == "__main__":
    sys.exit(main())
