"""The command `decausal eval harness`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from decausal.errors import UserError
from decausal.verbs.flags import VerbParser, at_least, given_to, positive, slow_imports
from decausal.verbs.records import add_output_flag, check_output, keep_record
from decausal.verbs.sampling import add_sampling_flags, check_model, sampler_options

DESCRIPTION = "Tasks of lm-evaluation-harness with a converted model, and with its AR source beside it."


def run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    check_output(flags.output)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is first imported
    check_model(flags.directory, sampler_options(flags))
    with slow_imports():
        from decausal.evaluation.harness.run import HarnessSettings, evaluate_harness

    sampler = {name: value for name, value in sampler_options(flags).items() if name not in ("seed", "temperature")}
    gen_kwargs = _gen_kwargs(flags.gen_kwargs, flags.temperature)
    options = given_to(HarnessSettings, flags) | {"gen_kwargs": gen_kwargs, "sampler": sampler}
    settings = HarnessSettings(**options)
    tasks = [name for name in flags.tasks.split(",") if name]
    scores = evaluate_harness(flags.directory, tasks, settings, include_path=flags.include_path, device=flags.device)
    found = scores.as_dict()
    seeds, used = {"sampler and masks": settings.seed}, scores.model["sampler"]
    keep_record(flags.output, ["eval", "harness"], arguments, flags.directory, found, seeds=seeds, sampler=used)
    if flags.json:
        print(json.dumps(found, indent=2, default=str))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(scores.as_table())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser("eval harness", DESCRIPTION)
    parser.add_argument("directory", help="what `decausal convert` wrote, or its id on the hub")
    parser.add_argument("--tasks", required=True, help="names joined by commas, patterns with *, or YAML files")
    parser.add_argument("--include_path", metavar="DIR", help="a directory of YAML files of tasks")
    parser.add_argument("--with_source", action="store_true", help="also run the AR source, by the harness's `hf`")
    parser.add_argument("--limit", type=float, help="examples of each task, or a share of them (all)")
    parser.add_argument("--num_fewshot", type=at_least(0), help="examples before each question (the task's own number)")
    parser.add_argument("--batch_size", type=positive, help="requests in the model at once (16)")
    parser.add_argument("--use_cache", metavar="DIR", help="keep answers here; an interrupted run can then continue")
    parser.add_argument("--likelihood", help="what scores are computed from: nelbo, causal (auto)")
    parser.add_argument("--num_samples", type=positive, help="mask patterns of a request, for the NELBO (8)")
    parser.add_argument("--apply_chat_template", action="store_true", help="put requests through the chat template")
    parser.add_argument("--system_instruction", metavar="TEXT", help="a system prompt")
    parser.add_argument(
        "--fewshot_as_one_turn",
        dest="fewshot_as_multiturn",
        action="store_false",
        help="all examples in one turn of the chat",
    )
    parser.add_argument("--gen_kwargs", default="", metavar="K=V,...", help="for tasks whose answers are written")
    parser.add_argument(
        "--allow_code_execution", action="store_true", help="run what a model writes, in a contained process"
    )
    parser.add_argument("--num_answers", type=positive, help="programs for each problem of code (1)")
    parser.add_argument(
        "--k", dest="ks", type=_whole_numbers, metavar="K,...", help="for which k pass@k is reported (1)"
    )
    parser.add_argument("--max_length", type=at_least(2), help="tokens of a request (the model's context)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (as the weights are stored)")
    parser.add_argument("--device", help="cuda, cpu (CUDA where there is one)")
    add_sampling_flags(parser)
    add_output_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"--k {text}: give whole numbers joined by commas, as in 1,10") from None


def _gen_kwargs(text: str, temperature: float | None) -> dict[str, Any]:
    """Reads K=V,K=V like the harness. A temperature goes there too, because tasks ask for greedy decoding."""
    found: dict[str, Any] = {} if temperature is None else {"temperature": temperature, "do_sample": temperature > 0}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--gen_kwargs holds '{pair}'; write NAME=VALUE, joined by commas")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            found[name] = value
    return found
