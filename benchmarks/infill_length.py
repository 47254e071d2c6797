"""How well is a gap of unknown length filled? Hides spans of held-out text whose length is known, and looks.

Two kinds of gaps: `span`, 1 to --max_gap tokens (uniform) anywhere in a text, and `line`, from a place within a line to
its end. Three questions, on the same gaps, with greedy decoding:

- rules: every length from 1 to --max_gap is filled, and rules to rank the fillings are compared;
- searches: what the library finds (`decausal.sampling.filling.lengths`), with how many passes;
- the true length, given: what an exact length would be worth.

    decausal convert tiny --recipe repr-align --data stdlib --data_fraction 0.3 --max_length 256 \\
        --per_device_train_batch_size 4 --learning_rate 1e-3 --max_steps 1000 --bf16 true --output_dir DIR
    OMP_NUM_THREADS=1 python benchmarks/infill_length.py DIR
"""

from __future__ import annotations

import argparse
import difflib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import decausal
from decausal.data.documents import read_documents
from decausal.provenance import provenance
from decausal.sampling.engines import write
from decausal.sampling.filling.lengths import CONTEXT_TOKENS, SCORING_GROUPS, scored_positions
from decausal.sampling.jobs import BATCH_SIZE, Job
from decausal.sampling.rows import Row
from decausal.sampling.scoring import score_tokens
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.texts import text_ids

PREFIX_TOKENS, SUFFIX_TOKENS = 80, 48


@dataclass(frozen=True)
class Gap:
    """Given text around a hole, and what the document says there."""

    prefix: list[int]
    truth: list[int]
    suffix: list[int]

    def row(self, length: int) -> Row:
        return Row((self.prefix, self.suffix), (length,), "the gap")


@dataclass
class Tally:
    """What a way of filling came to, gap by gap."""

    lengths: list[int] = field(default_factory=list)
    truths: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    seconds: float | None = None

    def add(self, tokenizer: Any, gap: Gap, ids: list[int], passes: int) -> None:
        self.lengths.append(len(ids))
        self.truths.append(len(gap.truth))
        equal = sum(ours == theirs for ours, theirs in zip(ids, gap.truth, strict=False))
        self.accuracy.append(equal / max(len(ids), len(gap.truth)))
        texts = tokenizer.decode(ids), tokenizer.decode(gap.truth)
        self.similarity.append(difflib.SequenceMatcher(None, *texts, autojunk=False).ratio())
        self.passes.append(passes)

    def figures(self) -> dict[str, float | None]:
        off = [abs(ours - true) for ours, true in zip(self.lengths, self.truths, strict=True)]
        return {
            "exact length": statistics.mean(error == 0 for error in off),
            "within 1": statistics.mean(error <= 1 for error in off),
            "tokens off": statistics.mean(off),
            "token accuracy": statistics.mean(self.accuracy),
            "edit similarity": statistics.mean(self.similarity),
            "row passes": statistics.mean(self.passes),
            "seconds": None if self.seconds is None else self.seconds / len(off),
        }


Rule = Callable[[torch.Tensor, torch.Tensor], float]
RULES: dict[str, Rule] = {
    "gap, sum": lambda gap, beside: gap.sum().item(),
    "gap, mean": lambda gap, beside: gap.mean().item(),
    "beside": lambda gap, beside: beside.sum().item(),
    "beside + gap": lambda gap, beside: (beside.sum() + gap.sum()).item(),
    "mean of both": lambda gap, beside: torch.cat([beside, gap]).mean().item(),
    "beside + gap / 4": lambda gap, beside: (beside.sum() + gap.sum() / 4).item(),
    "beside + gap / sqrt(n)": lambda gap, beside: (beside.sum() + gap.sum() / len(gap) ** 0.5).item(),
}
"""Of the log-probabilities of the gap's tokens, and of those of given tokens beside it. The last is the library's."""


def gaps_of(kind: str, tokenizer: Any, texts: Sequence[str], most: int, draw: random.Random) -> Iterator[Gap]:
    """Draws gaps without end, each from a text drawn at random."""
    while True:
        ids = text_ids(tokenizer, draw.choice(texts))
        if len(ids) < PREFIX_TOKENS + most + SUFFIX_TOKENS:
            continue
        start = draw.randrange(PREFIX_TOKENS, len(ids) - most - SUFFIX_TOKENS + 1)
        if kind == "span":
            length = draw.randint(1, most)
        else:
            ends = ["\n" in tokenizer.decode([token]) for token in ids[start : start + most]]
            length = ends.index(True) if True in ends else 0
        end = start + length
        if length:
            yield Gap(ids[start - PREFIX_TOKENS : start], ids[start:end], ids[end : end + SUFFIX_TOKENS])


def measure(model: Any, gaps: list[Gap], flags: argparse.Namespace) -> dict[str, Tally]:
    settings = SamplerSettings(threshold=flags.threshold)
    tallies = by_rules(model, gaps, settings, flags.max_gap)
    for search in ("candidates", "grow"):
        tallies[f"search: {search}"] = by_search(model, gaps, search, flags)
    tallies["the true length"] = Tally()
    for gap in gaps:
        (ended,) = write(model.converted, [Job(gap.row(len(gap.truth)), settings, 0)], batch_size=1)
        tallies["the true length"].add(model.tokenizer, gap, ended.ids, ended.num_forwards)
    return tallies


def by_rules(model: Any, gaps: list[Gap], settings: SamplerSettings, most: int) -> dict[str, Tally]:
    tallies = {f"rule: {name}": Tally() for name in RULES}
    for gap in gaps:
        rows = [gap.row(length) for length in range(1, most + 1)]
        ended = write(model.converted, [Job(row, settings, 0) for row in rows], batch_size=BATCH_SIZE)
        filled = [row.filled(each.ids) for row, each in zip(rows, ended, strict=True)]
        positions = [scored_positions(row, model.facts.shift) for row in rows]
        scores = score_tokens(model.converted, filled, positions, groups=SCORING_GROUPS)
        passes = sum(each.num_forwards for each in ended) + most * SCORING_GROUPS
        for name, rule in RULES.items():
            ranked = []
            for row, places, found in zip(rows, positions, scores, strict=True):
                (span,) = row.spans()
                is_gap = torch.tensor([place in span for place in places])
                ranked.append(rule(found.log_prob[is_gap], found.log_prob[~is_gap]))
            best = max(range(most), key=ranked.__getitem__)
            tallies[f"rule: {name}"].add(model.tokenizer, gap, ended[best].ids, passes)
    return tallies


def by_search(model: Any, gaps: list[Gap], search: str, flags: argparse.Namespace) -> Tally:
    from decausal.sampling.filling.infilling import choose_lengths
    from decausal.sampling.filling.lengths import GappedText

    tally, settings = Tally(), SamplerSettings(threshold=flags.threshold)
    start = time.process_time()
    texts = [GappedText((gap.prefix, gap.suffix), (None,), "the gap", 0) for gap in gaps]
    found = choose_lengths(
        model._converted, texts, settings, max_gap=flags.max_gap, search=search, batch_size=flags.batch_size
    )
    rows = [text.row(each.lengths) for text, each in zip(texts, found, strict=True)]
    jobs = [Job(row, settings, 0) for row in rows]
    ended = write(model.converted, jobs, batch_size=flags.batch_size)
    tally.seconds = time.process_time() - start
    for gap, done, each in zip(gaps, ended, found, strict=True):
        tally.add(model.tokenizer, gap, done.ids, each.num_forwards + done.num_forwards)
    return tally


def main() -> None:
    flags = _flags()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = decausal.load(flags.directory, device=flags.device, dtype=getattr(torch, flags.dtype))
    texts = [record["text"] for record in read_documents(flags.data)]
    record = {"command": " ".join(sys.orig_argv[1:]), **provenance(), "settings": vars(flags), "figures": {}}
    for kind in flags.kinds.split(","):
        drawn = gaps_of(kind, model.tokenizer, texts, flags.max_gap, random.Random(flags.seed))
        gaps = [next(drawn) for _ in range(flags.num_gaps)]
        figures = {name: tally.figures() for name, tally in measure(model, gaps, flags).items()}
        record["figures"][kind] = figures
        Console(width=120).print(_table(kind, gaps, figures))
    print(json.dumps({name: value for name, value in record.items() if name != "figures"}))
    if flags.json:
        Path(flags.json).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _table(kind: str, gaps: list[Gap], figures: dict[str, dict[str, float | None]]) -> Table:
    mean = statistics.mean(len(gap.truth) for gap in gaps)
    table = Table(title=f"{kind}: {len(gaps)} gaps of {mean:.1f} tokens; {CONTEXT_TOKENS} tokens beside are scored")
    table.add_column("")
    for column in next(iter(figures.values())):
        table.add_column(column, justify="right")
    for name, row in figures.items():
        table.add_row(name, *("" if value is None else f"{value:.3f}" for value in row.values()))
    return table


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a converted model")
    parser.add_argument("--data", default="stdlib-heldout")
    parser.add_argument("--kinds", default="span,line")
    parser.add_argument("--num_gaps", type=int, default=60, help="of each kind (60)")
    parser.add_argument("--max_gap", type=int, default=16)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
