"""The times that counted operations, bytes and kernels imply on an H200, as a table: docs/performance.md explains it.

python benchmarks/implied.py --rows 4 --length 4096
"""

from __future__ import annotations

import argparse

import torch
from models import build
from paper_steps import KINDS, META, PaperStep, block_pass

from decausal.devices import BANDWIDTH, LAUNCH, LAUNCH_IN_GRAPH
from decausal.training.planning.kernels import counted
from decausal.training.planning.tally import Tally

HEAD = (
    "| {} | operations over floor | kernels | MB per token | matrices | attention | elementwise | launches | implied |"
)


def line(name: str, tally: Tally, ratio: str, num_tokens: int | None, launch: float) -> str:
    """A row of the table; milliseconds."""
    parts = {part: f"{seconds * 1e3:,.1f}" for part, seconds in tally.seconds(launch).items()}
    memory = "" if num_tokens is None else f"{tally.peak_bytes / num_tokens / 1e6:.2f}"
    return (
        f"| {name} | {ratio} | {tally.kernels.total():,} | {memory} | {parts['matrices']} | {parts['attention']} | "
        f"{parts['elementwise']} | {parts['launches']} | {parts['total']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    print(HEAD.format(f"{args.model}, {args.rows} x {args.length}, bf16"))
    print("|" + "---|" * 9)
    for name in args.kinds:
        for is_flex in (False, True) if KINDS[name].block_size else (False,):
            step = PaperStep(KINDS[name], args.model, rows=args.rows, length=args.length, is_flex=is_flex)
            tally = step.tally()
            num_tokens = step.batch.get("student_ids", step.batch.get("noised_ids")).numel()
            ratio = f"{tally.operations / step.floor():.3f}"
            label = name + (", FlexAttention" if is_flex else ", dense mask" if KINDS[name].block_size else "")
            print(line(label, tally, ratio, num_tokens, LAUNCH), flush=True)
    model = build(args.model, META, torch.bfloat16)
    num_weights = sum(weight.numel() for weight in model.parameters())
    print(f"\nreading the weights once: {2 * num_weights / BANDWIDTH * 1e3:.2f} ms\n")
    print(HEAD.format("a pass of block decoding, 1,024 keys"))
    print("|" + "---|" * 9)
    for num_rows in (1, 32):
        tally = counted(block_pass(model, num_rows=num_rows, num_keys=1024))
        for label, launch in (("one by one", LAUNCH), ("as a graph", LAUNCH_IN_GRAPH)):
            print(line(f"{num_rows} row(s), {label}", tally, "", None, launch), flush=True)


if __name__ == "__main__":
    main()
