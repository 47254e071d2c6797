"""Are slips found, and mended? Replaces tokens of held-out text by others, and looks where `decausal edit` would.

For ways to judge each token: area under the ROC curve (a slip judged worse than a token that was not touched), and the
share of slips among the k tokens judged worst, k being the number of slips. The ways: a token's probability when the
model sees it, and when it is masked with every G-th token (`decausal.sampling.scoring`), its own or over the model's
first choice. Then what `edit` does with as many tokens as there are slips.

    OMP_NUM_THREADS=1 python benchmarks/edit_slips.py DIR        # DIR as in infill_length.py
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import decausal
from decausal.data.documents import read_documents
from decausal.models import backbone
from decausal.provenance import provenance
from decausal.sampling.engines import write
from decausal.sampling.jobs import BATCH_SIZE, Job
from decausal.sampling.rows import Row
from decausal.sampling.scoring import score_tokens
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.texts import text_ids

Judged = list[list[float]]


def slipped(tokenizer: Any, texts: Sequence[str], flags: argparse.Namespace) -> tuple[list[list[int]], list[list[int]]]:
    """Returns windows of text with and without slips; slips are tokens drawn from other places."""
    draw = random.Random(flags.seed)
    wrong, right = [], []
    while len(right) < flags.num_rows:
        ids, others = (text_ids(tokenizer, draw.choice(texts)) for _ in range(2))
        if min(len(ids), len(others)) < flags.max_length:
            continue
        start = draw.randrange(len(ids) - flags.max_length + 1)
        right.append(ids[start : start + flags.max_length])
        wrong.append(list(right[-1]))
        for place in draw.sample(range(1, flags.max_length), flags.num_slips):
            wrong[-1][place] = draw.choice([token for token in others if token != wrong[-1][place]])
    return wrong, right


def seen(model: Any, rows: list[list[int]]) -> tuple[Judged, Judged]:
    """Log-probabilities of tokens that the model sees, and over those of its first choices."""
    with torch.no_grad():
        logits = backbone.logits(model.model, torch.tensor(rows, device=model.model.device), model.facts.attention)
    logits[..., model.facts.mask_token_id] = -torch.inf
    log_probs = logits.float().log_softmax(-1).cpu().roll(model.facts.shift, dims=1)[:, 1:]
    own = log_probs.gather(2, torch.tensor(rows)[:, 1:, None]).squeeze(2)
    return own.tolist(), (own - log_probs.amax(2)).tolist()


def masked(model: Any, rows: list[list[int]], groups: int) -> tuple[Judged, Judged]:
    positions = [list(range(1, len(row))) for row in rows]
    scores = score_tokens(model._converted, rows, positions, groups=groups)
    own = [each.log_prob.tolist() for each in scores]
    return own, [(each.log_prob - each.best_log_prob).tolist() for each in scores]


def detection(judged: Judged, wrong: list[list[int]], right: list[list[int]]) -> tuple[float, float]:
    """Returns the area under the ROC curve and the share of slips among the worst, means over rows."""
    areas, shares = [], []
    for values, with_slips, without in zip(judged, wrong, right, strict=True):
        is_slip = [ours != theirs for ours, theirs in zip(with_slips[1:], without[1:], strict=True)]
        slips = [value for value, slip in zip(values, is_slip, strict=True) if slip]
        fine = [value for value, slip in zip(values, is_slip, strict=True) if not slip]
        pairs = [(a < b) + 0.5 * (a == b) for a in slips for b in fine]
        areas.append(statistics.mean(pairs))
        worst = sorted(range(len(values)), key=values.__getitem__)[: len(slips)]
        shares.append(statistics.mean(is_slip[place] for place in worst))
    return statistics.mean(areas), statistics.mean(shares)


def mended(model: Any, judged: Judged, wrong: list[list[int]], right: list[list[int]], count: int) -> dict[str, float]:
    """Rewrites the worst tokens of each row, as `edit` does; counts slips put right and good tokens put wrong."""
    rows = []
    for values, ids in zip(judged, wrong, strict=True):
        worst = sorted(range(len(values)), key=values.__getitem__)[:count]
        rows.append(Row.opened(ids, sorted(place + 1 for place in worst), "the row"))
    jobs = [Job(row, SamplerSettings(), seed) for seed, row in enumerate(rows)]
    ended = write(model.converted, jobs, batch_size=BATCH_SIZE)
    right_now = was_slip = broken = 0
    for row, done, with_slips, without in zip(rows, ended, wrong, right, strict=True):
        for now, before, true in zip(row.filled(done.ids), with_slips, without, strict=True):
            was_slip += before != true
            right_now += before != true and now == true
            broken += before == true and now != true
    return {"slips": was_slip, "put right": right_now, "good tokens changed": broken}


def main() -> None:
    flags = _flags()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = decausal.load(flags.directory, device=flags.device, dtype=getattr(torch, flags.dtype))
    wrong, right = slipped(model.tokenizer, [record["text"] for record in read_documents(flags.data)], flags)
    title = f"{flags.num_rows} rows of {flags.max_length} tokens, {flags.num_slips} slips in each"
    table = Table(
        "judged by", "AUC", "slips among worst", "AUC, over first choice", "slips among worst", "s", title=title
    )
    ways = [("seen, not masked", lambda: seen(model, wrong))]
    for groups in (int(groups) for groups in flags.groups.split(",")):
        ways.append((f"masked, {groups} groups", lambda groups=groups: masked(model, wrong, groups)))
    for name, judge in ways:
        start = time.process_time()
        own, ratio = judge()
        seconds = time.process_time() - start
        figures = (*detection(own, wrong, right), *detection(ratio, wrong, right))
        table.add_row(name, *(f"{figure:.3f}" for figure in figures), f"{seconds:.1f}")
    Console(width=110).print(table)
    print("edit, 8 groups:", mended(model, masked(model, wrong, 8)[1], wrong, right, flags.num_slips))
    print(json.dumps({"command": " ".join(sys.orig_argv[1:]), **provenance(), "settings": vars(flags)}))


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a converted model")
    parser.add_argument("--data", default="stdlib-heldout")
    parser.add_argument("--num_rows", type=int, default=30)
    parser.add_argument("--max_length", type=int, default=128, help="tokens in a row (128)")
    parser.add_argument("--num_slips", type=int, default=8, help="in each row (8)")
    parser.add_argument("--groups", default="1,2,4,8,16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
