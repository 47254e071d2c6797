"""The command `decausal sweep`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decausal.data.tasks import TASKS
from decausal.data.tasks.stream import named
from decausal.errors import UserError
from decausal.evaluation.sweep_settings import tried_settings
from decausal.models.names import check_converted
from decausal.verbs.flags import VerbParser, at_least, given_to, positive, slow_imports
from decausal.verbs.records import OUTPUT, add_output_flag, check_output, keep_record
from decausal.verbs.sampling import add_sampling_flags, sampler_options

if TYPE_CHECKING:
    from decausal.evaluation.sweep import Point, Questions

DESCRIPTION = """Quality against speed: the same questions under one sampler setting after another, with the AR source
and verified decoding beside them. With --output, an interrupted sweep goes on where it was, and `decausal report FILE`
draws it."""
_OF_HARNESS = ("limit", "num_fewshot", "include_path", "metric")


def run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    check_output(flags.output)
    names = [name for name in flags.tasks.replace("+", ",").split(",") if name]
    is_ours = all(name in TASKS for name in names)
    if is_ours:
        named(names)
        for name in _OF_HARNESS:
            if getattr(flags, name) is not None:
                raise UserError(f"--{name} is for tasks of lm-evaluation-harness; for these give --num_examples")
    facts = check_converted(flags.directory)
    fixed = sampler_options(flags)
    if facts is not None:
        tried_settings(facts, flags.over, fixed)  # refused before anything slow is imported
    with slow_imports():
        from decausal.devices import best_device, decoding_dtype
        from decausal.evaluation.sweep import as_figures, sweep
        from decausal.models.checkpoint import load_converted

    device = best_device()
    converted = load_converted(flags.directory, decoding_dtype(device), device)
    settings = tried_settings(converted.facts, flags.over, fixed)
    questions = _questions(flags, names, is_ours)
    source = _source(converted) if flags.with_source else None
    names = names or list(TASKS)
    hashes: list[str] = []

    def keep(points: list[Point], data_hash: str) -> None:
        hashes.append(data_hash)
        figures = as_figures(points, names, data_hash)
        seeds = {"sampler": fixed.get("seed", 0)}
        keep_record(flags.output, ["sweep"], arguments, flags.directory, figures, seeds=seeds, sampler=fixed)

    done = _done(flags.output, arguments, flags.directory)
    found = []
    for point in sweep(converted, source, questions, settings, done=done, on_point=keep):
        found.append(point)
        if not flags.json:
            print(_line(point), flush=True)
    keep(found, hashes[-1] if hashes else "")
    if flags.json:
        print(json.dumps(as_figures(found, names, hashes[-1] if hashes else ""), indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser("sweep", DESCRIPTION)
    parser.add_argument("directory", help="what `decausal convert` wrote, or its id on the hub")
    parser.add_argument(
        "--tasks",
        default="",
        help="our tasks joined by + (all of them), or tasks of lm-evaluation-harness whose answers are written",
    )
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="NAME=V,V,...",
        help="what is swept: threshold, num_steps, draft_length, block_size, ...; each is a line of its own "
        "(threshold and, where possible, verified decoding)",
    )
    parser.add_argument("--num_examples", type=positive, default=100, help="examples of each of our tasks (100)")
    parser.add_argument("--include_path", metavar="DIR", help="a directory of YAML files of tasks")
    parser.add_argument("--limit", type=float, help="examples of each task of the harness (all)")
    parser.add_argument("--num_fewshot", type=at_least(0), help="examples before each question (the task's own number)")
    parser.add_argument("--metric", help="the score of the harness that is drawn (the first where higher is better)")
    parser.add_argument("--apply_chat_template", action="store_true", help="put requests through the chat template")
    parser.add_argument(
        "--allow_code_execution", action="store_true", help="run what a model writes, in a contained process"
    )
    parser.add_argument("--batch_size", type=positive, default=16, help="rows written together (16)")
    parser.add_argument("--no_source", dest="with_source", action="store_false", help="leave the AR source out")
    add_sampling_flags(parser)
    add_output_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _questions(flags: argparse.Namespace, names: list[str], is_ours: bool) -> Questions:
    if is_ours:
        from decausal.evaluation.sweep import OurQuestions

        return OurQuestions(names, flags.num_examples, flags.batch_size)
    from decausal.evaluation.harness.run import HarnessSettings
    from decausal.evaluation.harness.written import HarnessQuestions

    settings = HarnessSettings(**given_to(HarnessSettings, flags) | {"with_source": False})
    return HarnessQuestions(names, settings, flags.include_path, flags.metric)


def _source(converted: Any) -> Any:
    """Returns the AR source in the engine's form. If there is none, a line says so."""
    from decausal.evaluation.source import source_of
    from decausal.evaluation.texts import causal

    try:
        return causal(source_of(converted), converted)
    except UserError as error:
        print(f"without the AR source: {error}", file=sys.stderr)
        return None


def _done(output: str | None, arguments: list[str], directory: str) -> list[Point]:
    """Returns the points of an interrupted run of the same command on the same weights."""
    from decausal.evaluation.sweep import Point
    from decausal.report.records import read_record, without_flags
    from decausal.verbs.records import JSON, described

    path = None if output is None else Path(output).expanduser()
    before = None if path is None else read_record(path)
    if before is None:
        return []
    same = before.arguments == ["sweep", *without_flags(arguments, OUTPUT, switches=[JSON])]
    if not same or before.model["fingerprint"] != described(directory)["fingerprint"]:
        raise UserError(f"{OUTPUT} {output} holds another sweep, or one of other weights: name another file")
    return [Point(**point) for point in before.figures["points"]]


def _line(point: Point) -> str:
    options = " ".join(f"{name}={value}" for name, value in point.options.items() if name != "speculative")
    error = "" if point.standard_error is None else f" ± {point.standard_error:.3f}"
    kept = "" if point.retention is None else f"  kept {point.retention:.1f} %"
    speed = "" if point.speedup is None else f" ({point.speedup:.2f} x AR)"
    return (
        f"{' '.join([point.series, options]).strip():40} score {point.accuracy:.3f}{error}{kept}  "
        f"{point.tokens_per_forward:.2f} tokens/forward  {point.tokens_per_second:.1f} tokens/s{speed}"
    )
