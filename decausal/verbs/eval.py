"""The command `decausal eval`."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from decausal.data.reading import Reading
from decausal.data.sources import refuse_missing
from decausal.data.tasks.stream import named
from decausal.errors import UserError
from decausal.verbs import eval_harness, eval_texts
from decausal.verbs.flags import (
    VerbParser,
    add_reading_flags,
    add_template_flags,
    at_least,
    given,
    given_to,
    positive,
    slow_imports,
    template_options,
    wants_help,
)
from decausal.verbs.records import add_output_flag, check_output, keep_record
from decausal.verbs.sampling import add_sampling_flags, check_model, sampler_options

NLL = "decausal eval nll DIR --data DATA"
TASKS = "decausal eval tasks MODEL"
HARNESS = "decausal eval harness DIR --tasks TASKS"
TEXTS = "decausal eval texts DIR --data PROMPTS"
# Common names of measures, and ours.
MEASURES = {
    **dict.fromkeys(("nll", "loss", "likelihood", "perplexity", "ppl", "nelbo", "bits_per_byte"), NLL),
    **dict.fromkeys(("tasks", "accuracy"), TASKS),
    **dict.fromkeys(("texts", "generations", "repetition", "diversity", "entropy", "generative_perplexity"), TEXTS),
    **dict.fromkeys(("harness", "lm_eval", "lm-eval", "benchmark", "benchmarks"), HARNESS),
}


def run(arguments: list[str]) -> int:
    measures = {"nll": _nll, "tasks": _tasks, "texts": eval_texts.run, "harness": eval_harness.run}
    if arguments and arguments[0] in measures:
        return measures[arguments[0]](arguments[1:])
    if wants_help(arguments):
        print("\n       ".join([f"usage: {NLL}", TASKS, TEXTS, HARNESS]) + "\n\nEach has its own --help.")
        return 0
    if not arguments:
        raise UserError(f"eval: name what to measure: {NLL}, {TASKS}, {TEXTS}, or {HARNESS}")
    raise UserError(f"eval: {_what_instead(arguments[0])}")


def _what_instead(name: str) -> str:
    """Returns what to type instead of an unknown measure: it may be a benchmark, one of our tasks, or the model."""
    from decausal.data.tasks import TASKS as NAMES

    if name in NAMES:
        return f"'{name}' is one of the tasks: decausal eval tasks MODEL --tasks {name}"
    if Path(name).expanduser().exists():
        return f"name the measure before the model: decausal eval nll {name} --data DATA, or decausal eval tasks {name}"
    if near := get_close_matches(name.lower(), MEASURES, n=1, cutoff=0.6):
        return f"'{name}' is not known; did you mean '{MEASURES[near[0]]}'?"
    return (
        f"there is no measure '{name}' here. A public benchmark: decausal eval harness DIR --tasks {name}. Likelihood "
        f"of its texts: {NLL}, a file or its id on the hub. Tasks of ours: {TASKS} --tasks {'+'.join(NAMES)}"
    )


def _nll(arguments: list[str]) -> int:
    parser = VerbParser("eval nll", "Likelihood of held-out text under a converted model, beside its AR source.")
    parser.add_argument("directory", help="what `decausal convert` wrote, or its id on the hub")
    parser.add_argument("--data", required=True, help="text, as for convert; 'stdlib-heldout' is always available")
    add_reading_flags(parser)
    add_template_flags(parser)
    parser.add_argument("--max_length", type=at_least(2), help="tokens in a row (512)")
    parser.add_argument("--num_rows", type=positive, default=64, help="rows to measure on (64)")
    parser.add_argument("--samples_per_row", type=positive, help="mask patterns per row (8)")
    parser.add_argument("--batch_size", type=positive, help="rows measured together (8)")
    parser.add_argument("--seed", type=int, help="of the masks, which are the same for every model (0)")
    parser.add_argument(
        "--no_source", dest="with_source", action="store_false", help="leave out the AR source's own likelihood"
    )
    add_output_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(arguments)
    check_output(flags.output)
    reading = Reading(**given_to(Reading, flags))
    template_options(flags)  # refuses a template that cannot be read
    check_model(flags.directory, {})
    refuse_missing(flags.data)
    with slow_imports():
        from decausal.evaluation.checkpoint import evaluate_checkpoint

    likelihood = evaluate_checkpoint(**given_to(evaluate_checkpoint, flags), reading=reading)
    found = likelihood.as_dict()
    keep_record(
        flags.output, ["eval", "nll"], arguments, flags.directory, found, seeds={"masks": flags.seed or 0}, sampler={}
    )
    return _print(likelihood, found, flags.json)


def _tasks(arguments: list[str]) -> int:
    parser = VerbParser("eval tasks", "Share of right answers to held-out tasks, and tokens per forward pass.")
    parser.add_argument(
        "model", help="what `decausal convert` wrote, or an AR model: a directory, hub id or 'tiny-tasks'"
    )
    parser.add_argument("--tasks", default="", help="tasks joined by + (all of them)")
    parser.add_argument("--num_examples", type=positive, default=100, help="examples of each task (100)")
    parser.add_argument("--max_new_tokens", type=int, help="tokens to write (what the longest completion needs)")
    add_sampling_flags(parser)
    parser.add_argument("--batch_size", type=positive, default=64, help="rows written together (64)")
    add_output_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(arguments)
    check_output(flags.output)
    names = [name for name in flags.tasks.replace(",", "+").split("+") if name]
    named(names)
    options = sampler_options(flags) | given(flags, "max_new_tokens")
    check_model(flags.model, options, may_be_source=True)
    with slow_imports():
        from decausal.evaluation.tasks import evaluate_tasks_of

    scores = evaluate_tasks_of(
        flags.model,
        names,
        flags.num_examples,
        batch_size=flags.batch_size,
        **options,
    )
    found = scores.as_dict()
    seeds = {"sampler": options.get("seed", 0)}
    keep_record(flags.output, ["eval", "tasks"], arguments, flags.model, found, seeds=seeds, sampler=options)
    return _print(scores, found, flags.json)


def _print(measured: Any, figures: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        from rich.console import Console

        Console().print(measured.as_table())
    return 0
