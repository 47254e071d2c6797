"""Conversions that lose nothing: tokens per pass by training tokens, rank, draft length and shape, on a real model.

    python benchmarks/lossless.py MODEL --data PROMPTS.jsonl --work DIR [--ranks 16,64,128] [--minutes 20]

Every step is kept in DIR and continued there after a kill. First the AR model answers all prompts (`decausal answers`);
the last `--held_out` are set aside. Then, for each rank, one conversion is trained for `--minutes`, and its checkpoints
are measured on the held-out prompts: greedy, verified, each shape, each draft length.

    same           share of texts that equal the AR model's, token for token (target: 1.000 in fp32)
    tokens/pass    tokens over forward passes, prompts' passes not counted (target: 2.2)
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import console, print_header
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from decausal.config import read_recipe, resolve
from decausal.files import write_whole
from decausal.models.checkpoint import Converted, load_converted
from decausal.provenance import provenance
from decausal.sampling.answers import load_writer, write_answers
from decausal.sampling.engines import engine_for
from decausal.sampling.jobs import Ended, Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import end_token_ids
from decausal.training.convert import convert
from decausal.training.settings import ConversionSettings

SHAPES = ("quadratic", "strided", "linear")


class StopAfter(TrainerCallback):
    """Ends a run, with a checkpoint, once its steps have taken so many minutes in all."""

    def __init__(self, minutes: float, clock: Path) -> None:
        self.seconds, self.clock = 60 * minutes, clock
        self.before = json.loads(clock.read_text()) if clock.exists() else 0.0
        self.start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        spent = self.before + time.perf_counter() - self.start
        if control.should_save or spent > self.seconds:
            self.clock.write_text(json.dumps(spent))
        if spent > self.seconds:
            control.should_save = control.should_training_stop = True
        return control


@dataclass(frozen=True)
class Question:
    """A held-out prompt, and what the AR model writes after it."""

    prompt: list[int]
    answer: list[int]


def answered(args: argparse.Namespace) -> tuple[Path, list[Question]]:
    """The AR model's answers: a file to train on, and the questions set aside."""
    whole, train = args.work / "answers.jsonl", args.work / "train.jsonl"
    model = load_writer(args.model)
    write_answers(model, [str(args.data)], whole, max_new_tokens=args.max_new_tokens, max_rows=32, temperature=0.0)
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    write_whole(train, "".join(lines[: -args.held_out]))
    return train, list(questions(model, map(json.loads, lines[-args.held_out :]), args))


def questions(model: Converted, records: Iterator[dict[str, Any]], args: argparse.Namespace) -> Iterator[Question]:
    """Asks the AR model once more, for its tokens: those of a text are not always those that were written."""
    template = model.tokenizer.apply_chat_template
    prompts = [
        list(template(record["messages"][:-1], add_generation_prompt=True, return_dict=False)) for record in records
    ]
    for prompt, row in zip(prompts, decoded(model, prompts, args), strict=True):
        yield Question(prompt, row.ids)


def decoded(model: Converted, prompts: list[list[int]], args: argparse.Namespace, **options: Any) -> list[Ended]:
    """What is written greedily after prompts."""
    engine = engine_for(
        model,
        max_rows=args.rows,
        max_length=max(map(len, prompts)) + args.max_new_tokens,
        is_autoregressive=model.facts.layout == "causal",
    )
    settings = SamplerSettings(max_new_tokens=args.max_new_tokens, temperature=0.0, **options)
    ends = end_token_ids(model)
    jobs = [Job(Row((prompt, []), (args.max_new_tokens,), "the prompt"), settings, 0, ends) for prompt in prompts]
    ended = dict(run(engine, jobs))
    return [ended[index] for index in range(len(prompts))]


def trained(rank: int, data: Path, args: argparse.Namespace) -> Path:
    """The directory of a conversion of this rank, trained for its minutes."""
    output_dir = args.work / f"rank-{rank}"
    if (output_dir / "decausal.json").exists():
        return output_dir
    flags = [f"--lora_r={rank}", f"--lora_alpha={2 * rank}", f"--data={data}", *args.flags]
    settings, training = resolve(
        ConversionSettings, read_recipe("lossless") | {"model_name_or_path": str(args.model)}, flags
    )
    resume = {"resume_from_checkpoint": "true"} if output_dir.exists() else {}
    made = {"output_dir": str(output_dir), "save_steps": args.save_steps, "save_only_model": False, "report_to": "none"}
    clock = args.work / f"rank-{rank}.seconds"
    convert(settings, training | made | resume, callbacks=[StopAfter(args.minutes, clock)])
    return output_dir


def measured(directory: Path, asked: list[Question], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of one model, for each shape and draft length."""
    model = load_converted(directory, getattr(torch, args.dtype))
    found = []
    for shape in args.shapes:
        for length in args.draft_lengths:
            drafts = {"speculative": True, "draft": shape, "draft_length": length}
            rows = decoded(model, [each.prompt for each in asked], args, **drafts)
            same = sum(row.ids == each.answer for row, each in zip(rows, asked, strict=True))
            tokens, passes = sum(len(row.ids) - 1 for row in rows), sum(row.num_forwards - 1 for row in rows)
            found.append(
                {"shape": shape, "draft_length": length, "same": same / len(rows), "tokens_per_pass": tokens / passes}
            )
    return found


def main() -> None:
    args = parsed()
    args.work.mkdir(parents=True, exist_ok=True)
    outcome = provenance() | {"command": shlex.join(["python", *sys.argv]), "dtype": args.dtype, "models": {}}
    data, asked = answered(args)
    for rank in args.ranks:
        directory = trained(rank, data, args)
        for checkpoint in sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
            name = f"rank {rank}, {checkpoint.name.replace('checkpoint-', 'step ')}"
            outcome["models"][name] = measured(checkpoint, asked, args)
            write_whole(args.json or args.work / "figures.json", json.dumps(outcome, indent=2) + "\n")
    print_header(outcome)
    table = Table("model", "shape", "drafts", "same", "tokens/pass")
    for name, figures in outcome["models"].items():
        for each in figures:
            table.add_row(
                name, each["shape"], str(each["draft_length"]), f"{each['same']:.3f}", f"{each['tokens_per_pass']:.3f}"
            )
    console.print(table)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an AR model with a chat template: a directory")
    parser.add_argument("--data", required=True, type=Path, help="conversations, of which the prompts are read")
    parser.add_argument("--work", required=True, type=Path, help="where answers, runs and figures are kept")
    parser.add_argument("--json", type=Path, help="where the figures go (DIR/figures.json)")
    parser.add_argument("--ranks", type=numbers, default=(16, 64, 128))
    parser.add_argument("--shapes", type=lambda text: tuple(text.split(",")), default=SHAPES)
    parser.add_argument("--draft_lengths", type=numbers, default=(2, 4, 6))
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, for each rank (20)")
    parser.add_argument("--held_out", type=int, default=255, help="prompts at the end that are not trained on (255)")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16, help="decoded together (16)")
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args, args.flags = parser.parse_known_args()
    return args


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
