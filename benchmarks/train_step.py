"""Time and memory of one training step, in ratios within one run, beside the FLOP floor.

    python benchmarks/train_step.py --steps 12 --json train_step.json

Cases take turns on the same batches, in a new order each round, so that noise of the machine falls on all of them;
each ratio is the median over rounds of a case's seconds over its baseline's in the same round.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from cases import BIDIRECTIONAL, CASES, Arms
from floors import ModelShape
from measure import host_waits, peak_bytes
from models import DEFAULT_MODELS, FALLBACK, SHAPES, add_model_arguments, build, settle_precision
from report import circumstances, print_header, print_loss_memory, print_steps
from torch import Tensor
from torch.nn import functional

from decausal.data.stream import Batch, Collator, Noising, TrainingStream
from decausal.devices import clock
from decausal.models.backbone import decoder_layers
from decausal.objectives.head import Head
from decausal.objectives.tokens import chunked_cross_entropy
from decausal.training.losses import Supervision
from decausal.training.memory import keep_freed_memory
from decausal.training.teacher import Teacher
from decausal.training.terms import AlignmentTerm

WARMUP_ROUNDS = 2
NUM_BATCHES = 4
LOSS_VOCABULARY = 151_936


class RandomRows:
    """Packed rows of random tokens, each of `documents` documents of equal length."""

    def __init__(self, vocab_size: int, length: int, documents: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._ids = torch.randint(vocab_size, (256, length), generator=generator)
        self._document_ids = torch.arange(length) * documents // length

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        is_maskable = torch.ones_like(self._document_ids, dtype=torch.bool)
        return {"clean_ids": self._ids[index], "document_ids": self._document_ids, "is_maskable": is_maskable}


@dataclass(frozen=True)
class Workload:
    """One model on one kind of batch; makes batches and runs steps."""

    arms: Arms
    optimizer: torch.optim.Optimizer
    device: torch.device
    is_bf16: bool
    batch_size: int
    length: int
    documents: int
    seed: int

    @classmethod
    def of(cls, model_name: str, device: torch.device, args: argparse.Namespace) -> Workload:
        shape = SHAPES.get(model_name, FALLBACK)
        student = build(model_name, device)
        teacher = Teacher(copy.deepcopy(student).to(torch.bfloat16 if args.bf16 else torch.float32))
        student.config.is_causal = False
        all_layers = tuple(range(len(decoder_layers(student)) + 1))
        supervision = Supervision(BIDIRECTIONAL, student.config.vocab_size - 1)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
        size = (args.batch_size or shape.batch_size, args.length or shape.length)
        arms = Arms(student.train(), teacher, supervision, AlignmentTerm(all_layers))
        return cls(arms, optimizer, device, args.bf16, *size, args.documents, args.seed)

    def make_batch(self, views: int, number: int) -> Batch:
        """Returns the run's batch of that number, on the CPU, through the library's stream and collator."""
        stream = self._stream(views)
        clean_rows = self.batch_size // views
        collate = Collator(mask_token_id=self.arms.supervision.mask_token_id, shift=1)
        return collate([stream[number * clean_rows + row] for row in range(clean_rows)])

    def _stream(self, views: int) -> TrainingStream:
        rows = RandomRows(self.arms.supervision.mask_token_id, self.length, self.documents, self.seed)
        noising = Noising(views, complementary=views == 2)
        return TrainingStream(rows, 2**20, seed=self.seed, shift=1, noising=noising)

    def batches(self, views: int) -> list[Batch]:
        """Returns the first batches as a step gets them: on the device, counts in fp32."""
        batches = [self.make_batch(views, number) for number in range(NUM_BATCHES)]
        return [
            {name: tensor.to(self.device) for name, tensor in batch.items() if name != "counts"}
            | {"counts": {name: count.to(self.device, torch.float32) for name, count in batch["counts"].items()}}
            for batch in batches
        ]

    def forward_backward(self, loss: Callable[[Arms, Batch], Tensor], batch: Batch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16):
            value = loss(self.arms, batch)
        value.backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.arms.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, function: Callable[[], Any]) -> float:
        start = clock(self.device)
        function()
        return clock(self.device) - start


def measure_steps(work: Workload, names: list[str], steps: int) -> dict[str, dict[str, Any]]:
    """Returns each case's figures by name."""
    batches = {views: work.batches(views) for views in {CASES[name].views for name in names}}
    times = _take_turns(work, names, batches, steps)
    results = {}
    for name in names:
        case, batch = CASES[name], batches[CASES[name].views][0]

        def step(case=case, batch=batch) -> None:
            work.forward_backward(case.loss, batch)

        memory, waits = peak_bytes(step, work.device), None
        work.optimizer.zero_grad()
        if not name.startswith("naive"):
            waits = host_waits(step, work.device)
            work.optimizer.zero_grad()
        results[name] = {
            "seconds": median(times[name]["forward_backward"]),
            "seconds_with_optimizer": median(times[name]["step"]),
            "memory_bytes": memory,
            "host_waits": waits,
            "times": times[name],
        }
    for name in names:
        _compare(results, name, _floor(work, name, batches[CASES[name].views]))
    return results


def _take_turns(
    work: Workload, names: list[str], batches: dict[int, list[Batch]], steps: int
) -> dict[str, dict[str, list[float]]]:
    times: dict[str, dict[str, list[float]]] = {name: {"forward_backward": [], "step": []} for name in names}
    order = random.Random(work.seed)
    for turn in range(WARMUP_ROUNDS + steps):
        for name in order.sample(names, len(names)):
            case = CASES[name]
            batch = batches[case.views][turn % NUM_BATCHES]
            first = work.seconds(lambda case=case, batch=batch: work.forward_backward(case.loss, batch))
            second = work.seconds(work.update)
            if turn >= WARMUP_ROUNDS:
                times[name]["forward_backward"].append(first)
                times[name]["step"].append(first + second)
    return times


def _floor(work: Workload, name: str, batches: list[Batch]) -> float:
    """FLOPs of the case over those of a plain step on the same batches."""
    shape, case = ModelShape.of(work.arms.student), CASES[name]
    num_targets = sum(len(batch["target_ids"]) for batch in batches)
    target_share = num_targets / sum(batch["noised_ids"].numel() for batch in batches)
    length = work.length // work.documents  # a token reads its own document
    plain = shape.plain_step(length, target_share)
    return shape.aligned_step(length, target_share, case.views) / plain if case.is_aligned else 1.0


def _compare(results: dict[str, dict[str, Any]], name: str, floor: float) -> None:
    case, own = CASES[name], results[name]
    baseline = results[case.baseline]
    for key, label in (("forward_backward", "ratio"), ("step", "ratio_with_optimizer")):
        pairs = zip(own["times"][key], baseline["times"][key], strict=True)
        own[label] = median(mine / theirs for mine, theirs in pairs)
    own |= {
        "floor": floor,
        "memory_ratio": own["memory_bytes"] / baseline["memory_bytes"],
        "time_target": case.time_target,
        "memory_target": case.memory_target,
    }


def measure_data(work: Workload, steps: int) -> float:
    """Returns the median seconds in which the stream and the collator make one batch."""
    return median(work.seconds(lambda number=number: work.make_batch(1, number)) for number in range(steps))


def measure_loss_memory(device: torch.device, tokens: int, width: int) -> dict[str, float]:
    """Returns peak bytes of our token loss and of the naive one, forward and backward, where half are targets.

    The gradients of states and head stay after the loss and are the same for both: they are not counted.
    """
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, generator=generator).requires_grad_()
    weight = (torch.randn(LOSS_VOCABULARY, width, device=device, generator=generator) * 0.02).requires_grad_()
    targets = torch.randint(LOSS_VOCABULARY, (tokens // 2,), device=device, generator=generator)
    index = torch.arange(0, tokens // 2 * 2, 2, device=device)
    weights = torch.ones(len(index), device=device)

    def ours() -> None:
        chunked_cross_entropy(hidden[index], Head(weight), targets, weights).loss_sum.backward()

    def naive() -> None:
        labels = torch.full((tokens,), -100, device=device)
        labels[index] = targets
        functional.cross_entropy(functional.linear(hidden, weight).float(), labels, reduction="sum").backward()

    peaks = {}
    for name, function in (("ours", ours), ("naive", naive)):
        hidden.grad = weight.grad = None
        left_behind = hidden.nbytes + weight.nbytes
        peaks[name] = peak_bytes(function, device) - left_behind
    return peaks | {"ratio": peaks["ours"] / peaks["naive"], "target": 0.1, "tokens": tokens, "width": width}


def main() -> None:
    args = _arguments()
    device = torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(args.seed)
    names = list(dict.fromkeys([CASES[name].baseline for name in args.cases] + args.cases))
    outcome: dict[str, Any] = circumstances() | {"models": {}}
    print_header(outcome)
    for model_name in args.model or DEFAULT_MODELS[device.type]:
        work = Workload.of(model_name, device, args)
        outcome["models"][model_name] = {
            "batch_size": work.batch_size,
            "length": work.length,
            "documents": work.documents,
            "bf16": work.is_bf16,
            "cases": measure_steps(work, names, args.steps),
            "data_seconds": measure_data(work, max(args.steps, 20)),
        }
        print_steps(model_name, outcome["models"][model_name])
        del work
    tokens, width = (8192, 1024) if device.type == "cuda" else (1024, 64)
    outcome["loss_memory"] = measure_loss_memory(device, tokens, width)
    print_loss_memory(outcome["loss_memory"], LOSS_VOCABULARY)
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser, "autocast")
    parser.add_argument("--steps", type=int, default=12, help="timed rounds")
    parser.add_argument("--batch_size", type=int, help="rows that the student reads, even")
    parser.add_argument("--length", type=int, help="tokens in a row")
    parser.add_argument("--documents", type=int, default=1, help="documents in a row; above 1, attention takes a mask")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    if args.steps < 1 or (args.batch_size or 2) % 2:
        parser.error("--steps must be at least 1 and --batch_size even")
    return settle_precision(args)


if __name__ == "__main__":
    main()
