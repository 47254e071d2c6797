"""Verified decoding: tokens per pass against the formulas, and time against the same engine without drafts.

    python benchmarks/verified.py DIR --data prompts.jsonl
    python benchmarks/verified.py DIR --data tasks-heldout:64 --batch_sizes 1 8 32 --dtypes float32 bfloat16

Shapes take turns, in a new order each round, so that noise of the machine falls on all of them. A ratio is the median
over rounds of a shape's tokens per second and those without drafts in the same round. Rows end at their limit alone. In
float32 every text has to be the one that is written without drafts; in bfloat16 their share is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import circumstances, console, print_by_batch_size, print_header

from decausal.data.documents import read_documents
from decausal.data.encode import encode
from decausal.devices import clock
from decausal.sampling.blocks.draft_shapes import (
    DraftShape,
    autoregressive,
    linear,
    quadratic,
    strided,
    tokens_per_pass,
)
from decausal.sampling.blocks.speculative import DRAFT_LENGTH, SpeculativeEngine
from decausal.sampling.jobs import Drafts, Ended, Job, run
from decausal.sampling.model import load
from decausal.sampling.rows import Row
from decausal.sampling.settings import DRAFTS, SamplerSettings
from decausal.sampling.settings.of_model import longest_draft

WITHOUT = "without drafts"
_SHAPES = {"quadratic": quadratic, "strided": strided, "linear": linear}


@dataclass(frozen=True)
class Run:
    """What one case took for one batch.

    Attributes:
        seconds: Of all passes, those of prompts too.
        ended: The rows.
    """

    seconds: float
    ended: list[Ended]

    @property
    def tokens_per_second(self) -> float:
        return sum(len(row.ids) for row in self.ended) / self.seconds

    @property
    def drafts(self) -> Drafts:
        return Drafts.sum(row.drafts for row in self.ended) or Drafts()


def cases_of(longest: int, lengths: Sequence[int]) -> dict[str, tuple[SamplerSettings, DraftShape | None]]:
    """Settings by name, and the shape that each names; None: it is chosen."""
    own = SamplerSettings(speculative=True)
    found: dict[str, tuple[SamplerSettings, DraftShape | None]] = {
        WITHOUT: (replace(own, draft_length=0), autoregressive()),
        "auto": (replace(own, draft_length=longest), None),
    }
    for length in lengths:
        for name in DRAFTS[1:]:
            shape = _SHAPES[name](length)
            found[shape.name] = (replace(own, draft=name, draft_length=length), shape)
    return found


def measure(
    model: Any, prompts: list[list[int]], num_new: int, lengths: Sequence[int], batch_size: int, rounds: int, seed: int
) -> list[dict[str, Any]]:
    """Returns a record per case."""
    longest = longest_draft(model.facts) or max(lengths, default=DRAFT_LENGTH)
    cases = cases_of(longest, [length for length in lengths if length <= longest])
    max_length = max(map(len, prompts)) + num_new
    engines = {name: SpeculativeEngine(model.converted, max_rows=batch_size, max_length=max_length) for name in cases}
    runs: dict[str, list[Run]] = {name: [] for name in cases}
    order = random.Random(seed)
    for turn in range(1 + rounds):
        for name in order.sample(list(cases), len(cases)):
            found = _written(engines[name], prompts, num_new, cases[name][0])
            if turn > 0:  # the first round warms up
                runs[name].append(found)
    return [_record(name, runs, cases[name][1], batch_size) for name in cases]


def _written(engine: SpeculativeEngine, prompts: list[list[int]], num_new: int, settings: SamplerSettings) -> Run:
    jobs = [Job(Row((prompt, []), (num_new,), "the prompt"), settings, seed) for seed, prompt in enumerate(prompts)]
    start = clock(engine.device)
    ended = dict(run(engine, jobs))
    return Run(clock(engine.device) - start, [ended[index] for index in range(len(jobs))])


def _record(name: str, runs: dict[str, list[Run]], shape: DraftShape | None, batch_size: int) -> dict[str, Any]:
    base, drafts = runs[WITHOUT], Drafts.sum(each.drafts for each in runs[name]) or Drafts()
    expected = None
    if shape is not None:
        measured = drafts.acceptances + [0.0] * (shape.most_pending - len(drafts.acceptances))
        expected = tokens_per_pass(shape, measured)
    texts = [
        (row.ids, other.ids)
        for each, without in zip(runs[name], base, strict=True)
        for row, other in zip(each.ended, without.ended, strict=True)
    ]
    ratios = [each.tokens_per_second / other.tokens_per_second for each, other in zip(runs[name], base, strict=True)]
    return {
        "batch_size": batch_size,
        "case": name,
        "acceptance": drafts.acceptances,
        "tokens_per_pass": drafts.tokens_per_pass,
        "expected": expected,
        "tokens_per_second": median(each.tokens_per_second for each in runs[name]),
        "speed_ratio": median(ratios),
        "same_texts": sum(one == other for one, other in texts) / len(texts),
        "passes": dict(drafts.passes),
    }


def prompts_of(model: Any, data: str, count: int) -> list[list[int]]:
    """The prompts of the first records, or the beginnings of documents."""
    found = []
    for record in islice(read_documents(data), count):
        document = encode(record, model.tokenizer, append_eos=False)
        num_given = int(document.is_maskable.argmax()) or min(32, len(document.ids))
        found.append(document.ids[:num_given].tolist())
    if len(found) < count:
        raise SystemExit(f"--data {data}: {len(found)} records, and {count} are needed")
    return found


COLUMNS = {
    "tokens/pass": lambda record: f"{record['tokens_per_pass']:.3f}",
    "formula": lambda record: "" if record["expected"] is None else f"{record['expected']:.3f}",
    "tokens/s": lambda record: f"{record['tokens_per_second']:.1f}",
    "ratio": lambda record: f"{record['speed_ratio']:.2f}",
    "same texts": lambda record: f"{record['same_texts']:.2f}",
    "first drafts right": lambda record: " ".join(f"{share:.2f}" for share in record["acceptance"][:4]),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    outcome: dict[str, Any] = circumstances() | {"runs": []}
    print_header(outcome)
    outcome["load"] = os.getloadavg()
    console.print(f"     [bold]load[/]  {', '.join(f'{each:.1f}' for each in outcome['load'])}")
    for dtype in args.dtypes:
        model = load(args.model, dtype=getattr(torch, dtype))
        prompts = prompts_of(model, args.data, args.num_rows)
        for batch_size in args.batch_sizes:
            records = measure(model, prompts, args.new_tokens, args.draft_lengths, batch_size, args.rounds, args.seed)
            outcome["runs"] += [{"dtype": dtype, **record} for record in records]
            title = f"{args.model}, {dtype}: {len(prompts)} rows of {args.new_tokens} new tokens"
            print_by_batch_size(title, records, COLUMNS)
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=2) + "\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what `decausal convert` wrote")
    parser.add_argument("--data", required=True, help="prompts, as for convert")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--draft_lengths", nargs="*", type=int, default=[2, 4], help="none: only `auto` (2 4)")
    parser.add_argument("--num_rows", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
