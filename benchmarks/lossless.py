"""Conversions that lose nothing: tokens per pass by training tokens, rank, draft length and shape, on a real model.

    decausal answers MODEL --data PROMPTS --output answers.jsonl --max_new_tokens 64 --temperature 0
    python benchmarks/lossless.py MODEL --answers answers.jsonl --work DIR [--ranks 16,64,128] [--max_steps 300]

The last `--held_out` answers are set aside. For each rank and seed one conversion is trained on the others, and
measured on some of the held-out answers while it runs. At the end it answers the held-out prompts itself, with each
shape and each draft length. Runs are kept in DIR and go on there after a kill. Other flags go to `decausal convert`.

    same           share of texts that equal the AR model's, token for token (target: 1.000 in fp32)
    tokens/pass    tokens over forward passes, prompts' passes not counted (target: 2.2)
    predicted      what the shape's formula gives for the acceptances that were measured (target: within 3 %)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from report import circumstances, console, print_header
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from decausal.config import read_recipe, resolve
from decausal.files import write_whole
from decausal.models.checkpoint import Converted, load_causal, load_converted
from decausal.sampling.blocks.draft_shapes import linear, quadratic, strided, tokens_per_pass
from decausal.sampling.engines import engine_for
from decausal.sampling.jobs import Drafts, Ended, Job, run
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.stopping import end_token_ids
from decausal.training.convert import convert
from decausal.training.draft_figure import DRAFTS_FILE
from decausal.training.settings import ConversionSettings
from decausal.training.step_records import read_records

SHAPES = {"quadratic": quadratic, "strided": strided, "linear": linear}


class Clock(TrainerCallback):
    """Counts the seconds of a run's steps in a file, without evaluations and checkpoints."""

    def __init__(self, file: Path) -> None:
        self.file, self.seconds = file, json.loads(file.read_text()) if file.exists() else 0.0
        self.mark = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.mark = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.seconds += time.perf_counter() - self.mark
        if control.should_save:
            self.file.write_text(json.dumps(self.seconds))
        return control


@dataclass(frozen=True)
class Question:
    """A held-out prompt, and what the AR model writes after it."""

    prompt: list[int]
    answer: list[int]


def split(args: argparse.Namespace) -> tuple[Path, Path, list[Question]]:
    """The AR model's answers: a file to train on, one of those set aside, and these as questions."""
    lines = [line + "\n" for line in args.answers.read_text(encoding="utf-8").split("\n") if line]
    train, held_out = args.work / "train.jsonl", args.work / "held-out.jsonl"
    write_whole(train, "".join(lines[: -args.held_out]))
    write_whole(held_out, "".join(lines[-args.held_out :]))
    # In the type in which models are measured: the AR model itself writes other texts in another type.
    model, asked = load_causal(args.model, getattr(torch, args.dtype)), lines[-args.held_out :][: args.num_asked]
    return train, held_out, list(questions(model, map(json.loads, asked), args))


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


def trained(name: str, rank: int, seed: int, data: tuple[Path, Path], args: argparse.Namespace) -> Path:
    """The directory of a conversion, trained and measured on the held-out answers as it went."""
    output_dir = args.work / name
    if (output_dir / "decausal.json").exists():
        return output_dir
    train, held_out = data
    flags = [f"--seed={seed}", f"--data={train}", f"--lora_r={rank}", *([f"--lora_alpha={2 * rank}"] if rank else [])]
    flags += [f"--eval_data={held_out}", f"--eval_rows={args.curve_rows}", f"--eval_steps={args.save_steps}"]
    flags += [f"--save_steps={args.save_steps}", f"--max_steps={args.max_steps}", "--save_only_model=false"]
    settings, training = resolve(
        ConversionSettings,
        read_recipe(args.recipe) | {"model_name_or_path": str(args.model)},
        [*flags, "--save_total_limit=1", "--report_to=none", *args.flags],
    )
    resume = {"resume_from_checkpoint": "true"} if output_dir.exists() else {}
    convert(settings, training | {"output_dir": str(output_dir)} | resume, callbacks=[Clock(clock_of(output_dir))])
    return output_dir


def clock_of(output_dir: Path) -> Path:
    return output_dir.with_suffix(".seconds")


def measured(directory: Path, asked: list[Question], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of one model, for each shape and draft length."""
    model = load_converted(directory, getattr(torch, args.dtype))
    found = []
    for shape, length in product(args.shapes, args.draft_lengths):
        drafts = {"speculative": True, "draft": shape, "draft_length": length}
        rows = decoded(model, [each.prompt for each in asked], args, **drafts)
        same = sum(row.ids == each.answer for row, each in zip(rows, asked, strict=True))
        total = Drafts.sum(row.drafts for row in rows if row.drafts is not None)
        found.append(
            {
                "shape": shape,
                "draft_length": length,
                "same": same / len(rows),
                "tokens_per_pass": total.tokens_per_pass,
                "acceptances": total.acceptances,
                "predicted": tokens_per_pass(SHAPES[shape](length), total.acceptances),
            }
        )
    return found


def main() -> None:
    args = parsed()
    args.work.mkdir(parents=True, exist_ok=True)
    outcome = circumstances() | {"dtype": args.dtype, "models": {}}
    train, held_out, asked = split(args)
    for rank, seed in product(args.ranks, args.seeds):
        name = f"{args.recipe}-rank-{rank}-seed-{seed}"
        directory = trained(name, rank, seed, (train, held_out), args)
        outcome["models"][name] = {
            "minutes": json.loads(clock_of(directory).read_text()) / 60,
            "curve": read_records(directory / DRAFTS_FILE) if (directory / DRAFTS_FILE).exists() else [],
            "figures": measured(directory, asked, args),
        }
        write_whole(args.json or args.work / "figures.json", json.dumps(outcome, indent=2) + "\n")
    print_header(outcome)
    table = Table("model", "minutes", "shape", "drafts", "same", "tokens/pass", "predicted")
    for name, found in outcome["models"].items():
        for each in found["figures"]:
            table.add_row(
                name,
                f"{found['minutes']:.1f}",
                each["shape"],
                str(each["draft_length"]),
                f"{each['same']:.3f}",
                f"{each['tokens_per_pass']:.3f}",
                f"{each['predicted']:.3f}",
            )
    console.print(table)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an AR model with a chat template: a directory")
    parser.add_argument("--answers", required=True, type=Path, help="what `decausal answers` wrote")
    parser.add_argument("--work", required=True, type=Path, help="where runs and figures are kept")
    parser.add_argument("--json", type=Path, help="where the figures go (DIR/figures.json)")
    parser.add_argument("--ranks", type=numbers, default=(16, 64, 128), help="of LoRA; 0: all weights (16,64,128)")
    parser.add_argument("--seeds", type=numbers, default=(0,))
    parser.add_argument("--recipe", default="lossless", help="lossless, or another one that trains drafts")
    parser.add_argument("--shapes", type=lambda text: tuple(text.split(",")), default=tuple(SHAPES))
    parser.add_argument("--draft_lengths", type=numbers, default=(2, 4, 6))
    parser.add_argument("--max_steps", type=int, default=300, help="of training (300)")
    parser.add_argument("--held_out", type=int, default=64, help="answers at the end that are not trained on (64)")
    parser.add_argument("--num_asked", type=int, help="held-out prompts that are answered at the end (all)")
    parser.add_argument("--curve_rows", type=int, default=16, help="held-out rows that are measured during a run (16)")
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
