"""What do keys and values of an earlier pass cost? Fills spans of held-out text with the caches of decode windows.

For each cache and refresh interval, against the same rows decoded with every pass reading the whole row:

- equal: share of tokens that are those of the exact decode; right: share that are the document's;
- KL, TV: how far distributions are from those of an exact pass over the same ids, at the masked positions of the
  window, mean over all of a decode's passes: KL(exact || cached) in nats, and half the sum of absolute differences;
- tokens per pass; passes, tokens read and processor seconds, over those of the exact decode. One row at a time.

    decausal convert tiny --recipe repr-align --data stdlib --data_fraction 0.3 --max_length 256 \\
        --per_device_train_batch_size 4 --learning_rate 1e-3 --max_steps 1000 --bf16 true --output_dir DIR
    OMP_NUM_THREADS=1 python benchmarks/cache_error.py DIR
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import decausal
from decausal.data.documents import read_documents
from decausal.diffusion.shift import predicting_index
from decausal.models.backbone import body_forward
from decausal.models.checkpoint import Converted
from decausal.objectives.head import logits
from decausal.provenance import provenance
from decausal.sampling.bidirectional.denoiser import Denoiser, OpenRows
from decausal.sampling.row_settings import RowSettings
from decausal.sampling.rows import Row
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.texts import text_ids

EXACT = "exact"


@dataclass(frozen=True)
class Decoded:
    """One row, decoded once."""

    ids: list[int]
    num_passes: int
    num_tokens_read: int
    seconds: float
    divergence: list[float]
    variation: list[float]


def cases(flags: argparse.Namespace) -> dict[str, SamplerSettings]:
    """The exact decode first, then caches; all with the same windows."""
    exact = SamplerSettings(threshold=flags.threshold, window=flags.window)
    found = {EXACT: exact}
    for cache in flags.caches.split(","):
        for word in flags.refresh.split(","):
            refresh = None if word == "never" else int(word)
            name = f"{cache}, " + ("at each window" if refresh is None else f"every {refresh} passes")
            found[name] = exact.updated(cache=cache, cache_refresh=refresh)
    return found


def gaps_of(tokenizer: Any, texts: Sequence[str], flags: argparse.Namespace) -> Iterator[tuple[Row, list[int]]]:
    """Draws without end: a row with a gap, and what the document says there."""
    draw, before, gap = random.Random(flags.seed), flags.prefix, flags.gap
    while True:
        ids = text_ids(tokenizer, draw.choice(texts))
        if len(ids) >= before + gap + flags.suffix:
            start = draw.randrange(len(ids) - before - gap - flags.suffix + 1)
            piece = ids[start : start + before + gap + flags.suffix]
            yield Row((piece[:before], piece[before + gap :]), (gap,), "the row"), piece[before : before + gap]


@torch.no_grad()
def decoded(converted: Converted, row: Row, settings: SamplerSettings) -> Decoded:
    """Decodes a row, and beside every pass that used a cache reads the whole row, to compare."""
    model, _, facts = converted
    device = next(model.parameters()).device
    ids = torch.tensor([row.ids(facts.mask_token_id)], device=device)
    is_open = torch.zeros_like(ids, dtype=torch.bool)
    for span in row.spans():
        is_open[:, span.start : span.stop] = True
    zero, document_ids = torch.zeros(1, dtype=torch.long, device=device), torch.zeros_like(ids)
    own = RowSettings.of([settings], device)
    rows = OpenRows(ids, is_open, is_open.clone(), document_ids, zero, zero.clone(), zero, own, is_whole=True)
    denoiser = Denoiser(model, facts, 1)
    seconds, passes, read = 0.0, 0, 0
    divergence: list[float] = []
    variation: list[float] = []
    while bool(rows.is_masked.any()):
        seen = rows.ids
        start = time.process_time()
        step = denoiser.advance(rows)
        passes, read = passes + 1, read + int(step.num_tokens_read)
        seconds += time.process_time() - start
        if int(step.num_tokens_read) < row.length:
            states = body_forward(model, seen, facts.attention).last_hidden_state.flatten(0, 1)
            found = distances(denoiser, states[predicting_index(step.index, facts.shift)], step.states)
        else:
            found = (0.0, 0.0)
        divergence.append(found[0])
        variation.append(found[1])
    (span,) = row.spans()
    return Decoded(rows.ids[0, span.start : span.stop].tolist(), passes, read, seconds, divergence, variation)


@torch.no_grad()
def distances(denoiser: Denoiser, exact: Tensor, cached: Tensor) -> tuple[float, float]:
    """KL(exact || cached) and total variation, means over positions; the mask token has no probability in either."""
    p, q = (logits(states, denoiser.head).double().log_softmax(-1) for states in (exact, cached))
    is_there = p > -torch.inf
    difference = torch.where(is_there, p - q, 0.0)
    return float((p.exp() * difference).sum(-1).mean()), float((p.exp() - q.exp()).abs().sum(-1).mean() / 2)


def measure(converted: Converted, rows: Sequence[tuple[Row, list[int]]], flags: argparse.Namespace) -> dict[str, Any]:
    """Figures by case; the cases take turns on every row."""
    found: dict[str, list[Decoded]] = {name: [] for name in cases(flags)}
    for settings in cases(flags).values():  # warm
        decoded(converted, rows[0][0], settings)
    for row, _ in rows:
        for name, settings in cases(flags).items():
            found[name].append(decoded(converted, row, settings))
    exact = found[EXACT]
    return {name: figures(results, exact, [truth for _, truth in rows]) for name, results in found.items()}


def figures(results: Sequence[Decoded], exact: Sequence[Decoded], truths: Sequence[list[int]]) -> dict[str, float]:
    def share(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> float:
        pairs = [a == b for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]
        return statistics.mean(pairs)

    def over(name: str) -> float:
        return sum(getattr(each, name) for each in results) / sum(getattr(each, name) for each in exact)

    ids = [each.ids for each in results]
    return {
        "equal": share(ids, [each.ids for each in exact]),
        "right": share(ids, truths),
        "KL": statistics.mean(value for each in results for value in each.divergence),
        "TV": statistics.mean(value for each in results for value in each.variation),
        "tokens/pass": sum(map(len, ids)) / sum(each.num_passes for each in results),
        "passes": over("num_passes"),
        "tokens read": over("num_tokens_read"),
        "seconds": over("seconds"),
    }


def main() -> None:
    flags = _flags()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = decausal.load(flags.directory, device=flags.device, dtype=getattr(torch, flags.dtype))
    texts = [record["text"] for record in read_documents(flags.data)]
    drawn = gaps_of(model.tokenizer, texts, flags)
    rows = [next(drawn) for _ in range(flags.num_rows)]
    print(json.dumps({"command": " ".join(sys.orig_argv[1:]), **provenance(), "settings": vars(flags)}))
    found = measure(model.converted, rows, flags)
    title = (
        f"{flags.num_rows} gaps of {flags.gap} tokens in {flags.prefix} and {flags.suffix}, windows of {flags.window}"
    )
    table = Table("cache, read whole", *next(iter(found.values())), title=title)
    for name, row in found.items():
        table.add_row(name, *(f"{value:.4f}" if key == "KL" else f"{value:.3f}" for key, value in row.items()))
    Console(width=110).print(table)
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump({**provenance(), "settings": vars(flags), "figures": found}, file, indent=2)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a converted model of layout bidirectional")
    parser.add_argument("--data", default="stdlib-heldout")
    parser.add_argument("--num_rows", type=int, default=30)
    parser.add_argument("--prefix", type=int, default=96, help="given tokens before the gap (96)")
    parser.add_argument("--gap", type=int, default=64, help="tokens to fill (64)")
    parser.add_argument("--suffix", type=int, default=48, help="given tokens after the gap (48)")
    parser.add_argument("--window", type=int, default=16, help="open positions decided at a time (16)")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--caches", default="prefix,dual")
    parser.add_argument(
        "--refresh", default="never,8,4,2", help="passes between whole ones; never: each window's first"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", help="file to write all figures to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
