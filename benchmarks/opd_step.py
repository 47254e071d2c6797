"""What an on-policy step costs: rollout, teacher and student in seconds and operations, beside the floor of operations.

    python benchmarks/opd_step.py --rounds 6 --json opd_step.json

Each round rolls out a batch of prompts and trains on it once; then the plain block step, token loss alone, takes its
turn on the same batch. Weights are random: rollouts never end, so every answer is as long as its budget.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from floors import ModelShape
from measure import peak_bytes
from models import DEFAULT_MODELS, add_model_arguments, build, settle_precision
from opd_floor import count_operations, decode_floor, training_floor
from report import circumstances, console, print_header
from rich.table import Table
from torch import Tensor

from decausal.data.block_collator import BlockCollator
from decausal.data.prompts import Prompts
from decausal.data.stream import Batch
from decausal.devices import clock
from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, head_of
from decausal.models.facts import ConversionFacts
from decausal.sampling.settings import SamplerSettings
from decausal.training.losses import Supervision, loss_sums
from decausal.training.memory import keep_freed_memory
from decausal.training.on_policy import OnPolicyRows, RolloutPlan
from decausal.training.questions import Answers, Question, Vocabulary, ask
from decausal.training.rollouts import Decoding, Rollout, Task
from decausal.training.teacher import CAUSAL, Teacher
from decausal.training.terms import DivergenceTerm, Term, TokenTerm

FLOP_TARGET = 1.15
WARMUP_ROUNDS = 1


@dataclass
class Workload:
    """One model, and everything that an on-policy step of it needs."""

    student: Any
    teacher: Teacher
    supervision: Supervision
    term: DivergenceTerm
    rows: OnPolicyRows
    decoding: Decoding
    device: torch.device
    is_bf16: bool
    batch_size: int

    @classmethod
    def of(cls, model_name: str, args: argparse.Namespace) -> Workload:
        device = torch.device(args.device)
        student = build(model_name, device)
        student.generation_config.eos_token_id = None
        teacher = Teacher(copy.deepcopy(student).to(torch.bfloat16 if args.bf16 else torch.float32))
        student.config.is_causal = False
        layout = Layout("block", args.block_size)
        mask_token_id = student.config.vocab_size - 1
        facts = ConversionFacts(model_name, "block", args.shift, mask_token_id, args.block_size)
        decoding = Decoding(facts, SamplerSettings(temperature=1.0, threshold=args.threshold), (), args.prompts)
        rows = OnPolicyRows(
            prompts=random_prompts(args.prompts, args.prompt_length, mask_token_id, args.seed),
            plan=RolloutPlan(
                prompts=args.prompts,
                updates=1,
                states=args.states,
                state_choice="block",
                tokens=args.new_tokens,
                start_tokens=args.new_tokens,
                curriculum=0,
                max_length=2 * args.prompt_length + args.new_tokens + args.block_size,
                block_size=args.block_size,
            ),
            collator=BlockCollator(mask_token_id, args.shift, layout, kl_mean="sequence"),
            seed=args.seed,
            first_row=0,
            end_row=2**40,
            rows_per_batch=args.prompts,
        )
        supervision, term = Supervision(layout, mask_token_id), DivergenceTerm(top_k=args.top_k)
        return cls(student.train(), teacher, supervision, term, rows, decoding, device, args.bf16, args.prompts)

    def roll_out(self, tasks: Sequence[Task]) -> list[Rollout]:
        with self.autocast():
            return self.decoding.roll_out(self.student, tasks)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16)

    def batch(self, number: int) -> Batch:
        """Rolls out the batch of that number."""
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        batch = self.rows.batch(list(positions), number, self.roll_out)
        return {name: part.to(self.device) for name, part in batch.items() if name != "counts"}

    def ask(self, batch: Batch) -> Answers:
        """What the teacher says."""
        vocabulary = Vocabulary(self.student.config.vocab_size, self.supervision.mask_token_id)
        with self.autocast():
            return ask(self.teacher, self.term.questions, batch, vocabulary)

    def train(self, batch: Batch, term: Term, answers: Answers) -> None:
        """Forward and backward of the student."""
        with self.autocast():
            loss = loss_sums(self.student, batch, self.supervision, (term,), answers)[term]
        loss.backward()
        self.student.zero_grad()

    def naive(self, batch: Batch) -> None:
        """Contrast: the teacher reads the doubled row, and all logits of both models are there at once."""
        rows = {"document_ids": batch["student_document_ids"], "position_ids": batch["student_position_ids"]}
        with self.autocast():
            with torch.no_grad():
                states = body_forward(self.teacher.model, batch["student_ids"], CAUSAL, **rows).last_hidden_state
                log_p = (states @ head_of(self.teacher.model).weight.T).float().log_softmax(-1)
            states = body_forward(
                self.student, batch["student_ids"], self.supervision.layout, stream_ids=batch["stream_ids"], **rows
            ).last_hidden_state
            log_q = (states @ head_of(self.student).weight.T).float().log_softmax(-1)
        is_target = torch.zeros(log_q.shape[:2], dtype=torch.bool, device=self.device)
        is_target.view(-1)[batch["target_index"]] = True
        (((log_p.exp() * (log_p - log_q)).sum(-1)) * is_target).sum().backward()
        self.student.zero_grad()

    def seconds(self, function: Callable[[], Any]) -> tuple[float, Any]:
        start = clock(self.device)
        result = function()
        return clock(self.device) - start, result


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> Prompts:
    """Prompts of half to one and a half times `length` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (length // 2 + torch.randint(length + 1, (count,), generator=generator)).clamp(min=1)
    return Prompts.of(
        torch.randint(vocab_size, (int(size),), generator=generator, dtype=torch.int32).numpy() for size in lengths
    )


def measure_step(work: Workload, rounds: int) -> dict[str, Any]:
    """Returns seconds, operations and memory of the parts of a step."""
    times: dict[str, list[float]] = {name: [] for name in ("rollout", "teacher", "student", "plain")}
    batch: Batch = {}
    for turn in range(WARMUP_ROUNDS + rounds):
        rolled_out, batch = work.seconds(lambda turn=turn: work.batch(turn))
        asked, answers = work.seconds(lambda batch=batch: work.ask(batch))
        trained, _ = work.seconds(lambda batch=batch, answers=answers: work.train(batch, work.term, answers))
        plain, _ = work.seconds(lambda batch=batch: work.train(batch, TokenTerm(), {}))
        if turn >= WARMUP_ROUNDS:
            for name, value in zip(times, (rolled_out, asked, trained, plain), strict=True):
                times[name].append(value)
    return {
        "seconds": {name: median(values) for name, values in times.items()},
        "over_plain": median(
            (teacher + student) / plain
            for teacher, student, plain in zip(times["teacher"], times["student"], times["plain"], strict=True)
        ),
        "with_rollout_over_plain": median(
            (rollout + teacher + student) / plain
            for rollout, teacher, student, plain in zip(*times.values(), strict=True)
        ),
        "operations": measure_operations(work, WARMUP_ROUNDS + rounds),
        "memory": measure_memory(work, batch),
    }


def measure_operations(work: Workload, number: int) -> dict[str, Any]:
    """Returns the operations of one step, counted, and their floor."""
    batch: dict[str, Tensor] = {}
    rollout = count_operations(lambda: batch.update(work.batch(number)))
    rollouts = list(work.rows._rollouts.values())
    answers: dict[Question, Any] = {}
    teacher = count_operations(lambda: answers.update(work.ask(batch)))
    student = count_operations(lambda: work.train(batch, work.term, answers))
    shape = ModelShape.of(work.student)
    floors = training_floor(shape, rollouts, batch, work.rows.plan, work.term.top_k)
    counted = {"rollout": rollout, "teacher": teacher, "student": student}
    floors = {"rollout": decode_floor(shape, rollouts, work.rows.plan.block_size)} | floors
    return {
        "counted": counted,
        "floor": floors,
        "ratio": sum(counted.values()) / sum(floors.values()),
        "training_ratio": (teacher + student) / (floors["teacher"] + floors["student"]),
        "target": FLOP_TARGET,
    }


def measure_memory(work: Workload, batch: Batch) -> dict[str, float]:
    """Returns the peak bytes of teacher and student, and of the naive form."""
    ours = peak_bytes(lambda: work.train(batch, work.term, work.ask(batch)), work.device)
    naive = peak_bytes(lambda: work.naive(batch), work.device)
    return {"ours": ours, "naive": naive, "ratio": ours / naive}


def print_figures(model_name: str, figures: dict[str, Any], args: argparse.Namespace) -> None:
    title = (
        f"{model_name}: {args.prompts} prompts of about {args.prompt_length} tokens, {args.new_tokens} new ones, "
        f"blocks of {args.block_size}, {args.states} state(s), {'all tokens' if args.top_k is None else args.top_k}"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("part", "ms", "share", "GFLOP", "floor", "ratio"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    seconds, operations = figures["seconds"], figures["operations"]
    total = sum(seconds[name] for name in operations["counted"])
    for name, counted in operations["counted"].items():
        floor = operations["floor"][name]
        table.add_row(
            name,
            f"{seconds[name] * 1e3:.1f}",
            f"{seconds[name] / total:.0%}",
            f"{counted / 1e9:.2f}",
            f"{floor / 1e9:.2f}",
            f"{counted / floor:.3f}",
        )
    console.print(table)
    console.print(
        f"operations over the floor: {operations['ratio']:.3f} in all, {operations['training_ratio']:.3f} without the "
        f"rollout (target {FLOP_TARGET})\n"
        f"seconds over the plain block step's: {figures['over_plain']:.2f} teacher and student, "
        f"{figures['with_rollout_over_plain']:.2f} with the rollout\n"
        f"peak memory: {figures['memory']['ours'] / 1e6:.1f} MB, naive {figures['memory']['naive'] / 1e6:.1f} MB, "
        f"ratio {figures['memory']['ratio']:.3f}\n"
    )


def main() -> None:
    args = _arguments()
    if args.device == "cpu":
        keep_freed_memory()
    torch.manual_seed(args.seed)
    outcome: dict[str, Any] = circumstances() | {"models": {}}
    print_header(outcome)
    for model_name in args.model or DEFAULT_MODELS[args.device][:1]:
        outcome["models"][model_name] = measure_step(Workload.of(model_name, args), args.rounds)
        print_figures(model_name, outcome["models"][model_name], args)
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser, "autocast")
    parser.add_argument("--rounds", type=int, default=6, help="timed rounds")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt_length", type=int, default=64, help="mean tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--block_size", type=int, default=4)
    parser.add_argument("--shift", type=int, default=0, choices=(0, 1))
    parser.add_argument("--states", type=int, default=1, help="states of a rollout in one row")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--top_k", type=int, help="the teacher's tokens to compare on; unset: all")
    args = parser.parse_args()
    return settle_precision(args)


if __name__ == "__main__":
    main()
