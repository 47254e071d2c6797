"""The times that counted operations, bytes and kernels imply on an H200, as tables: docs/performance.md explains them.

python benchmarks/implied.py --rows 4 --length 4096
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from compiled_layers import Plan, decoding_layer, teacher_layer, training_layer
from models import SHAPES, build
from paper_steps import KINDS, META, Kind, PaperStep, block_pass
from report import circumstances, print_header

from decausal.devices import BANDWIDTH, LAUNCH, LAUNCH_IN_GRAPH
from decausal.gpus import GPUS
from decausal.models.backbone import body_forward
from decausal.training.planning.kernels import counted
from decausal.training.planning.tally import Tally
from decausal.training.teacher import CAUSAL

PEAK_RATE = GPUS["h200"].peak_rate
BYTES_OF_AN_UPDATE = 40
"""Read and written for each weight by fused AdamW (28) and by clipping gradients (12)."""
BLOCK_SIZE = 4
NUM_KEYS = 1024
PARTS = ("matrices", "attention", "elementwise", "launches", "total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b", choices=[name for name in SHAPES if "layers" not in name])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    print_header(circumstances())
    for layers in (1, 2):
        SHAPES[f"{args.model}, {layers} of its layers"] = replace(SHAPES[args.model], num_hidden_layers=layers)
    steps = dict(steps_of(args.model, args.rows, args.length, args.kinds))
    passes = dict(passes_of(args.model))
    reading = 2 * sum(weight.numel() for weight in build(args.model, META).parameters()) / BANDWIDTH
    print("\n| target | layers as they are | compiled |\n|---|---|---|")
    for row in [*of_steps(steps), *of_decoding(passes, reading)]:
        print(row)


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        tally: Its count.
        floor: The operations that it cannot do without.
        update: Seconds of clipping and of the optimizer.
        state_bytes: What is held between steps: weights, moments, teacher.
    """

    tally: Tally
    floor: float
    update: float
    state_bytes: int

    @property
    def seconds(self) -> float:
        """What the count implies, with the update of the weights."""
        return self.tally.seconds()["total"] + self.update

    @property
    def utilisation(self) -> float:
        """The share of the data sheet's rate that the floor's operations get."""
        return self.floor / self.seconds / PEAK_RATE


def steps_of(name: str, rows: int, length: int, kinds: list[str]) -> Iterator[tuple[str, tuple[Step, Step]]]:
    """Counts and prints steps of each kind, as they are and with compiled layers."""
    print(
        f"\n| {name}, {rows} x {length} | operations over floor | MB per token | kernels | matrices | attention ",
        end="",
    )
    print("| elementwise | launches | update | implied | compiled: kernels | elementwise | implied |\n|" + "---|" * 13)
    for kind in kinds:
        for is_flex in (False, True) if KINDS[kind].block_size else (False,):
            step = PaperStep(KINDS[kind], name, rows=rows, length=length, is_flex=is_flex)
            tally = step.tally()
            weights = sum(weight.numel() for weight in step.student.parameters())
            update = BYTES_OF_AN_UPDATE * weights / BANDWIDTH
            as_it_is = Step(tally, step.floor(), update, state_bytes(step))
            compiled = replace(as_it_is, tally=compiled_tally(step, tally, name, rows, length))
            label = kind + (", FlexAttention" if is_flex else ", dense mask" if KINDS[kind].block_size else "")
            num_tokens = step.batch.get("student_ids", step.batch.get("noised_ids")).numel()
            parts, after = (each.tally.seconds() for each in (as_it_is, compiled))
            print(
                f"| {label} | {tally.operations / as_it_is.floor:.3f} | {tally.peak_bytes / num_tokens / 1e6:.2f} | "
                f"{tally.kernels.total():,} | "
                + " | ".join(f"{parts[part] * 1e3:.1f}" for part in PARTS[:-1])
                + f" | {update * 1e3:.1f} | {as_it_is.seconds * 1e3:.1f} | {compiled.tally.kernels.total():,} | "
                f"{after['elementwise'] * 1e3:.1f} | {compiled.seconds * 1e3:.1f} |",
                flush=True,
            )
            yield label, (as_it_is, compiled)


def compiled_tally(step: PaperStep, tally: Tally, name: str, rows: int, length: int) -> Tally:
    """Returns a step's count with its layers' own kernels as the compiler plans them, and nothing else changed."""
    num_layers = step.student.config.num_hidden_layers
    batch = step.batch
    num_tokens = batch.get("student_ids", batch.get("noised_ids")).numel()
    own = Kind(block_size=step.kind.block_size, views=step.kind.views)
    changes = [(layer_of_student(name, own, rows, length, step.is_flex), training_plan(name), num_tokens)]
    if step.teacher is not None:
        clean = batch["clean_ids"]
        changes.append((layer_of_teacher(name, *clean.shape), teacher_plan(name), clean.numel()))
    num_bytes, kernels = tally.num_bytes, tally.kernels.copy()
    for (bytes_before, kernels_before), plan, tokens in changes:
        num_bytes += num_layers * (plan.for_tokens(tokens) - bytes_before)
        kernels["of layers"] += num_layers * (plan.kernels - kernels_before)
    return replace(tally, num_bytes=num_bytes, kernels=kernels)


training_plan, teacher_plan = cache(training_layer), cache(teacher_layer)


@cache
def layer_of_student(name: str, kind: Kind, rows: int, length: int, is_flex: bool) -> tuple[float, int]:
    """Bytes and kernels of a layer as it is, apart from products and attention: what two layers have more than one."""
    one, two = (
        PaperStep(kind, f"{name}, {layers} of its layers", rows=rows, length=length, is_flex=is_flex).tally()
        for layers in (1, 2)
    )
    return two.num_bytes - one.num_bytes, two.kernels.total() - one.kernels.total()


@cache
def layer_of_teacher(name: str, rows: int, length: int) -> tuple[float, int]:
    """The same for a teacher's layer."""
    ids = torch.zeros(rows, length, dtype=torch.long, device=META)

    def tally(layers: int) -> Tally:
        model = build(f"{name}, {layers} of its layers", META, torch.bfloat16).eval()
        with torch.no_grad():
            return counted(lambda: body_forward(model, ids, CAUSAL))

    one, two = tally(1), tally(2)
    return two.num_bytes - one.num_bytes, two.kernels.total() - one.kernels.total()


def state_bytes(step: PaperStep) -> int:
    """Bytes of the student's weights with two moments of AdamW, and of the teacher's weights."""
    teacher = () if step.teacher is None else step.teacher.model.parameters()
    return 3 * sum(weight.nbytes for weight in step.student.parameters()) + sum(weight.nbytes for weight in teacher)


def of_steps(steps: dict[str, tuple[Step, Step]]) -> Iterator[str]:
    """The targets of training steps that were counted."""
    plain = steps.get("plain")
    if plain is None:
        return
    yield f"| plain: 45 % of {PEAK_RATE / 1e12:.0f} TFLOP/s | " + _both(f"{step.utilisation:.0%}" for step in plain)
    for name, most in (("aligned", 1.30), ("aligned, 2 views", 1.18)):
        if name in steps:
            ratios = (step.seconds / one.seconds for step, one in zip(steps[name], plain, strict=True))
            yield f"| {name}: at most {most:.2f} of plain | " + _both(f"{ratio:.2f}" for ratio in ratios)
    for name, block in steps.items():
        if name.startswith("block, ") and "KL" not in name:
            over = (
                step.seconds / one.seconds / (step.floor / one.floor) for step, one in zip(block, plain, strict=True)
            )
            yield f"| {name}: at most 1.15 of its floor, relative to plain | " + _both(f"{ratio:.2f}" for ratio in over)
            held = (block[0].tally.peak_bytes + block[0].state_bytes) / 2**30
            yield f"| {name}: in 80 GiB | {held:.0f} GiB of tensors | not more |"


@dataclass(frozen=True)
class Pass:
    """A recorded pass of decoding: its count, and its kernels in all and in each layer."""

    tally: Tally
    of_layer: int

    @property
    def seconds(self) -> float:
        """What the count implies, as a graph."""
        return self.tally.seconds(LAUNCH_IN_GRAPH)["total"]


def passes_of(name: str) -> Iterator[tuple[int, tuple[Pass, Pass]]]:
    """Counts and prints passes of block decoding over 1 and 32 rows, as they are and compiled."""
    print(f"\n| a pass of block decoding, {NUM_KEYS:,} keys | kernels | of a layer | ", end="")
    print("matrices | attention | elementwise | launches | implied |\n|" + "---|" * 8)
    for num_rows in (1, 32):
        found = []
        for is_compiled in (False, True):
            tallies = [pass_tally(name + layers, num_rows, is_compiled) for layers in (", 1 of its layers", "")]
            found.append(_pass(name, num_rows, is_compiled, *tallies))
        launches = (("one by one", found[0], LAUNCH), ("recorded", found[0], LAUNCH_IN_GRAPH))
        for label, each, launch in (*launches, ("recorded and compiled", found[1], LAUNCH_IN_GRAPH)):
            parts = each.tally.seconds(launch)
            print(
                f"| {num_rows} row(s), {label} | {each.tally.kernels.total():,} | {each.of_layer} | "
                + " | ".join(f"{parts[part] * 1e3:.2f}" for part in PARTS)
                + " |",
                flush=True,
            )
        yield num_rows, (found[0], found[1])


def pass_tally(name: str, num_rows: int, is_flex: bool) -> Tally:
    """The count of a pass whose rows hold all the keys that it may read."""
    model = build(name, META, torch.bfloat16)
    one_pass = block_pass(model, num_rows=num_rows, num_keys=NUM_KEYS, block_size=BLOCK_SIZE, is_flex=is_flex)
    return counted(one_pass, flex_pairs=num_rows * BLOCK_SIZE * NUM_KEYS if is_flex else None)


def _pass(name: str, num_rows: int, is_compiled: bool, one: Tally, whole: Tally) -> Pass:
    num_layers = SHAPES[name].num_hidden_layers
    of_layer = (whole.kernels.total() - one.kernels.total()) // (num_layers - 1)
    if not is_compiled:
        return Pass(whole, of_layer)
    plan = decode_plan(name, num_rows)
    bytes_of_layer = (whole.num_bytes - one.num_bytes) / (num_layers - 1)
    kernels = whole.kernels.copy()
    kernels["of layers"] += num_layers * (plan.kernels - of_layer)
    num_bytes = whole.num_bytes + num_layers * (plan.num_bytes - bytes_of_layer)
    return Pass(replace(whole, num_bytes=num_bytes, kernels=kernels), plan.kernels)


def decode_plan(name: str, num_rows: int) -> Plan:
    """The compiler's plan. A small cache: what is written to one counts as the whole of it."""
    return decoding_layer(name, num_rows=num_rows, num_keys=2 * BLOCK_SIZE, is_flex=True, is_merged=True)


def of_decoding(passes: dict[int, tuple[Pass, Pass]], reading: float) -> Iterator[str]:
    """The targets of a pass over one row."""
    yield "| at most 16 kernels a layer | " + _both(str(each.of_layer) for each in passes[1])
    label = f"at most 1.3 of reading the weights ({reading * 1e3:.2f} ms), recorded"
    yield f"| {label} | " + _both(f"{each.seconds / reading:.1f}" for each in passes[1])


def _both(values: Iterator[str]) -> str:
    return " | ".join(values) + " |"


if __name__ == "__main__":
    main()
