"""What scoring by lm-evaluation-harness costs: against its own `hf` model, and against one forward per mask pattern.

    python benchmarks/harness_speed.py --model SOURCE --include_path TASKS --limit 40 --json figures.json

From one AR model three conversions are made, with its very weights: blocks of one token (the AR model itself),
blocks of 4, and bidirectional. On the requests of a multiple-choice task:

    causal   seconds of ours over seconds of `hf`, both exact and of the same weights (target: at most 1.5),
             and the largest difference of a log-likelihood
    NELBO    seconds of one forward per mask pattern and request, over ours with the same patterns (target: at least 2),
             and the largest difference
    errors   variance of the mean over as many patterns, over ours: of independent noise levels t, uniform above 0.001,
             with weights 1/t, and of independent numbers of masked tokens, with weights n/m. Times the ratio of seconds
             this is what one forward per pattern takes to the same standard error

MODEL may also be a converted model. Then its trained weights are read under each layout.

Cases take turns, in a new order each round; a ratio is the median over rounds. On one thread seconds are processor
seconds, so that other processes do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from report import console, print_header
from rich.table import Table

import decausal.evaluation.harness  # noqa: F401 - registers the model
from decausal.devices import clock
from decausal.diffusion.layout import Layout
from decausal.diffusion.nelbo import draw_unit_patterns
from decausal.evaluation.continuations import nelbo
from decausal.evaluation.continuations.nelbo import score_by_nelbo
from decausal.evaluation.continuations.scored import Continuation
from decausal.evaluation.harness.model import DecausalLM
from decausal.evaluation.passes import measuring
from decausal.evaluation.patterns import WeightedPatterns, weighted_patterns
from decausal.models.adapt import adapt, load_source
from decausal.models.checkpoint import ConversionFacts, Converted, load_converted, save_converted
from decausal.models.names import is_converted
from decausal.provenance import provenance

CAUSAL_TARGET, NELBO_TARGET = 1.5, 2.0
KINDS: dict[str, dict[str, Any]] = {
    "block": {"layout": "block", "block_size": 4, "causal_context": True, "shift": 1},
    "bidirectional": {"layout": "bidirectional", "shift": 1},
}


@dataclass(frozen=True)
class Timed:
    """Seconds of each round, and what the last one gave."""

    seconds: list[float]
    answers: list[float]


def take_turns(cases: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, Timed]:
    """Runs each case once to warm up, then once a round."""
    names, answers = list(cases), {name: case() for name, case in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = clock(torch.device("cpu"))
            answers[name] = cases[name]()
            seconds[name].append(clock(torch.device("cpu")) - start)
    return {name: Timed(seconds[name], answers[name]) for name in names}


def requests_of(task: str, include_path: str, limit: int) -> list[Any]:
    """The likelihood requests of a task's first examples."""
    loaded = TaskManager(include_path=include_path, include_defaults=False).load([task])["tasks"][task]
    loaded.build_all_requests(limit=limit, rank=0, world_size=1)
    return list(loaded.instances)


def converted(source: str, kind: dict[str, Any], dtype: torch.dtype) -> Converted:
    """A conversion with the source's very weights."""
    if is_converted(source):
        trained = load_converted(source, dtype, "cpu")
        shared = replace(trained.facts, block_size=None, causal_context=False)
        return trained._replace(facts=replace(shared, **kind))
    model, tokenizer = load_source(source, dtype=dtype)
    layout = Layout(kind["layout"], kind.get("block_size"), kind.get("causal_context", False))
    mask_token_id = adapt(model, tokenizer, layout=layout)
    return Converted(model, tokenizer, ConversionFacts(source=source, mask_token_id=mask_token_id, **kind))


def compare_causal(flags: argparse.Namespace, requests: list[Any], folder: Path) -> dict[str, Any]:
    """Ours against `hf`."""
    dtype = getattr(torch, flags.dtype)
    save_converted(folder, *converted(flags.model, {"layout": "block", "block_size": 1, "shift": 1}, dtype))
    ours = DecausalLM(str(folder), dtype=dtype, batch_size=flags.batch_size, device="cpu")
    theirs = HFLM(pretrained=flags.model, dtype=flags.dtype, batch_size=flags.batch_size, device="cpu")
    models = {"ours": ours, "hf": theirs}
    timed = take_turns({name: lambda lm=lm: _answers(lm, requests) for name, lm in models.items()}, flags.rounds)
    ratios = [mine / other for mine, other in zip(timed["ours"].seconds, timed["hf"].seconds, strict=True)]
    return _figures("causal, over hf", ratios, timed["ours"], timed["hf"], CAUSAL_TARGET)


def _answers(model: HFLM, requests: list[Any]) -> list[float]:
    return [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]


def compare_nelbo(flags: argparse.Namespace, requests: list[Any], name: str) -> dict[str, Any]:
    """One forward per pattern and request, over ours."""
    whole = converted(flags.model, KINDS[name], getattr(torch, flags.dtype))
    asked = [_continuation(whole, *request.args) for request in requests]
    cases = {
        "ours": lambda: _bounds(whole, asked, flags.num_samples, flags.batch_size),
        "one by one": lambda: _one_by_one(whole, asked, flags.num_samples),
    }
    timed = take_turns(cases, flags.rounds)
    ratios = [other / mine for mine, other in zip(timed["ours"].seconds, timed["one by one"].seconds, strict=True)]
    return _figures(f"NELBO, {name}: one forward per pattern, over ours", ratios, *timed.values(), NELBO_TARGET)


def _levels(units: torch.Tensor, num_patterns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patterns of independent noise levels of each unit, and the weights of losses."""
    generator = torch.Generator().manual_seed(seed)
    level = 1e-3 + (1 - 1e-3) * torch.rand(num_patterns, int(units.max()) + 1, generator=generator).double()
    level = level[:, units.clamp(min=0)]
    is_masked = (torch.rand(level.shape, generator=generator) < level) & (units >= 0)
    return is_masked, 1 / level


def _counts(units: torch.Tensor, num_patterns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patterns of independent numbers of masked tokens of each unit, and the weights of losses."""
    drawn = [draw_unit_patterns(units, 1, seed=seed + number) for number in range(num_patterns)]
    masked = torch.cat([each.num_masked for each in drawn]).clamp(min=1)
    return torch.cat([each.is_masked for each in drawn]), drawn[0].num_maskable / masked


def _estimates(whole: Converted, one: Continuation, is_masked: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted loss of each pattern."""
    patterns = WeightedPatterns(is_masked, weight.double(), torch.zeros_like(is_masked[0]))
    losses = torch.zeros_like(patterns.weight)
    with measuring(whole.model):
        for pieces in nelbo._passes([one], [patterns]):
            nelbo._add_losses(whole, [one], [patterns], [losses], pieces)
    return (losses * patterns.weight).sum(dim=1)


def compare_errors(flags: argparse.Namespace, requests: list[Any], name: str) -> dict[str, Any]:
    """Variances of other estimators over ours, each summed over some requests."""
    whole = converted(flags.model, KINDS[name], getattr(torch, flags.dtype))
    ours, reported, others = 0.0, 0.0, {"levels": 0.0, "counts": 0.0}
    for request in requests[:: max(1, len(requests) // flags.error_requests)][: flags.error_requests]:
        one = _continuation(whole, *request.args)
        units = nelbo.units_of(one, whole.facts)
        drawn = [weighted_patterns(units, flags.num_samples, seed=n, position=0) for n in range(flags.error_seeds)]
        sizes = [len(each.is_masked) for each in drawn]
        masks = torch.cat([each.is_masked for each in drawn])
        parts = _estimates(whole, one, masks, torch.cat([each.weight for each in drawn])).split(sizes)
        ours += float(torch.stack([part.mean() for part in parts]).var())
        reported += statistics.mean(float(part.var()) / len(part) for part in parts)
        for kind, draw in (("levels", _levels), ("counts", _counts)):
            found = _estimates(whole, one, *draw(units, flags.num_samples * flags.error_seeds, 10**6))
            others[kind] += float(found.var()) / flags.num_samples
    return {
        "name": f"errors, {name}",
        **{f"variance of independent {kind}, over ours": value / ours for kind, value in others.items()},
        "reported variance over ours": reported / ours,
        "standard error of a request, nats": (ours / flags.error_requests) ** 0.5,
    }


def _continuation(whole: Converted, context: str, text: str) -> Continuation:
    before = whole.tokenizer(context)["input_ids"]
    return Continuation(before, whole.tokenizer(context + text)["input_ids"][len(before) :])


def _bounds(whole: Converted, asked: list[Continuation], num_samples: int, batch_size: int) -> list[float]:
    found = dict(score_by_nelbo(whole, asked, num_samples=num_samples, batch_size=batch_size))
    return [found[index].log_likelihood for index in range(len(asked))]


def _one_by_one(whole: Converted, asked: list[Continuation], num_samples: int) -> list[float]:
    """The same patterns, each in a forward of its own."""
    longest, nelbo.LONGEST_PASS = nelbo.LONGEST_PASS, 1
    try:
        return _bounds(whole, asked, num_samples, 1)
    finally:
        nelbo.LONGEST_PASS = longest


def _figures(name: str, ratios: list[float], mine: Timed, other: Timed, target: float) -> dict[str, Any]:
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "target": target,
        "seconds": statistics.median(mine.seconds),
        "largest_difference": max(abs(a - b) for a, b in zip(mine.answers, other.answers, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an AR model: a directory or hub id")
    parser.add_argument("--include_path", required=True, help="what local_tasks.py wrote")
    parser.add_argument("--task", default="piqa_local", help="a multiple-choice task (piqa_local)")
    parser.add_argument("--limit", type=int, default=40, help="examples (40)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_samples", type=int, default=8, help="mask patterns (8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cases", default="causal,block,bidirectional")
    parser.add_argument("--errors", default="", help="kinds whose estimates are compared: block,bidirectional (none)")
    parser.add_argument("--error_requests", type=int, default=6)
    parser.add_argument("--error_seeds", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("runs/harness_speed"), help="for the conversion")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    flags = parser.parse_args()
    requests = requests_of(flags.task, flags.include_path, flags.limit)
    cases = flags.cases.split(",")
    found = [compare_causal(flags, requests, flags.folder)] if "causal" in cases else []
    found += [compare_nelbo(flags, requests, name) for name in KINDS if name in cases]
    errors = [compare_errors(flags, requests, name) for name in KINDS if name in flags.errors.split(",")]
    outcome = provenance() | {
        "command": " ".join(["python", *sys.argv]),
        "num_requests": len(requests),
        "cases": found,
        "errors": errors,
    }
    print_header(outcome)
    table = Table("case", title=f"{len(requests)} requests of {flags.task}, {flags.dtype}")
    for heading in ("ratio", "target", "our seconds", "largest difference, nats"):
        table.add_column(heading, justify="right")
    for case in found:
        figures = (f"{case['ratio']:.2f}", f"{case['target']:.1f}", f"{case['seconds']:.2f}")
        table.add_row(case["name"], *figures, f"{case['largest_difference']:.2g}")
    console.print(table)
    for case in errors:
        console.print("; ".join(f"{key}: {value:.2f}" if key != "name" else value for key, value in case.items()))
    if flags.json:
        flags.json.write_text(json.dumps(outcome, indent=2) + "\n")


if __name__ == "__main__":
    main()
