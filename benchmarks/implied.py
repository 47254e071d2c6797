"""The times that counted operations, bytes and kernels imply on an H200, as a table: docs/performance.md explains it.

python benchmarks/implied.py --rows 4 --length 4096
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from models import build
from paper_steps import KINDS, META, PaperStep, block_pass

from decausal.devices import BANDWIDTH, LAUNCH, LAUNCH_IN_GRAPH
from decausal.gpus import GPUS
from decausal.training.planning.kernels import counted
from decausal.training.planning.tally import Tally

PEAK_RATE = GPUS["h200"].peak_rate
KERNELS_OUTSIDE_LAYERS = 85
"""Of a decoding pass: two and four layers were counted."""
COMPILED_KERNELS = 15
"""Of a compiled layer, by compiled_kernels.py."""
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
    print(HEAD.format(f"{args.model}, {args.rows} x {args.length}, bf16 on fp32 weights"))
    print("|" + "---|" * 9)
    steps: dict[str, Step] = {}
    for name in args.kinds:
        for is_flex in (False, True) if KINDS[name].block_size else (False,):
            step = PaperStep(KINDS[name], args.model, rows=args.rows, length=args.length, is_flex=is_flex)
            tally = step.tally()
            num_tokens = step.batch.get("student_ids", step.batch.get("noised_ids")).numel()
            label = name + (", FlexAttention" if is_flex else ", dense mask" if KINDS[name].block_size else "")
            steps[label] = Step(tally, step.floor(), state_bytes(step))
            print(line(label, tally, f"{tally.operations / step.floor():.3f}", num_tokens, LAUNCH), flush=True)
    model = build(args.model, META, torch.bfloat16)
    reading = 2 * sum(weight.numel() for weight in model.parameters()) / BANDWIDTH
    print(f"\nreading the weights once: {reading * 1e3:.2f} ms\n")
    print(HEAD.format("a pass of block decoding, 1,024 keys"))
    print("|" + "---|" * 9)
    passes = {}
    for num_rows in (1, 32):
        passes[num_rows] = counted(block_pass(model, num_rows=num_rows, num_keys=1024))
        for label, launch in (("one by one", LAUNCH), ("as a graph", LAUNCH_IN_GRAPH)):
            print(line(f"{num_rows} row(s), {label}", passes[num_rows], "", None, launch), flush=True)
    print("\n| target | implied today |\n|---|---|")
    for row in [*of_steps(steps), *of_decoding(passes[1], model.config.num_hidden_layers, reading)]:
        print(row)


def state_bytes(step: PaperStep) -> int:
    """Bytes of the student's weights with two moments of AdamW, and of the teacher's weights."""
    teacher = () if step.teacher is None else step.teacher.model.parameters()
    return 3 * sum(weight.nbytes for weight in step.student.parameters()) + sum(weight.nbytes for weight in teacher)


@dataclass(frozen=True)
class Step:
    """A step's count, the operations that it cannot do without, and the bytes of what is held between steps."""

    tally: Tally
    floor: float
    state_bytes: int

    @property
    def seconds(self) -> float:
        """What the count implies."""
        return self.tally.seconds()["total"]


def of_steps(steps: dict[str, Step]) -> Iterator[str]:
    """The targets of training steps that were counted."""
    plain = steps.get("plain")
    if plain is None:
        return
    parts = plain.tally.seconds()
    left = plain.floor / (0.45 * PEAK_RATE) - parts["matrices"] - parts["attention"]
    yield (
        f"| plain: 45 % of {PEAK_RATE / 1e12:.0f} TFLOP/s | {plain.floor / plain.seconds / PEAK_RATE:.0%}; the target "
        f"leaves {left * 1e3:.0f} ms for elementwise work, now {parts['elementwise'] * 1e3:.0f} |"
    )
    for name, most in (("aligned", 1.30), ("aligned, 2 views", 1.18)):
        if name in steps:
            yield f"| {name}: at most {most:.2f} of plain | {steps[name].seconds / plain.seconds:.2f} |"
    for name, step in steps.items():
        if name.startswith("block, ") and "KL" not in name:
            over = step.seconds / plain.seconds / (step.floor / plain.floor)
            held = (step.tally.peak_bytes + step.state_bytes) / 2**30
            yield f"| {name}: at most 1.15 of its floor, relative to plain | {over:.2f} |"
            yield f"| {name}: in 80 GiB | {held:.0f} GiB of tensors |"


def of_decoding(tally: Tally, num_layers: int, reading: float) -> Iterator[str]:
    """The targets of a pass over one row: today, recorded, and with layers of few kernels."""
    total, rest = tally.kernels.total(), KERNELS_OUTSIDE_LAYERS
    yield f"| at most 16 kernels a layer | {(total - rest) / num_layers:.0f} |"
    yield f"| the same, compiled (`compiled_kernels.py`) | {COMPILED_KERNELS} |"
    for name, kernels, launch in (
        ("one by one", total, LAUNCH),
        ("recorded", total, LAUNCH_IN_GRAPH),
        ("recorded and compiled", num_layers * COMPILED_KERNELS + rest, LAUNCH_IN_GRAPH),
    ):
        device = sum(seconds for part, seconds in tally.seconds(launch).items() if part not in ("launches", "total"))
        yield f"| at most 1.3 of reading the weights, {name} | {max(device, kernels * launch) / reading:.1f} |"


if __name__ == "__main__":
    main()
