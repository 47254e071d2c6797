"""The command `decausal answers`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decausal.data.reading import Reading
from decausal.data.sources import refuse_missing
from decausal.errors import UserError
from decausal.models.names import check_converted, is_left_to_the_hub
from decausal.sampling.answering import MAX_NEW_TOKENS, STOPS, TRUNCATED, check_options
from decausal.sampling.job_files import check_target
from decausal.verbs.flags import (
    VerbParser,
    add_reading_flags,
    add_template_flags,
    given,
    given_to,
    positive,
    slow_imports,
    template_options,
)
from decausal.verbs.sampling import (
    ENGINE_FLAGS,
    add_engine_flags,
    add_sampling_flags,
    check_model,
    progress_bar,
    sampler_options,
)
from decausal.wording import quantity

if TYPE_CHECKING:
    from decausal.sampling.answers import AnswersResult

DESCRIPTION = """Answer the prompts of a data set by an AR model, or by a converted one, and write what it wrote as
training data: every recipe takes the file as --data, and trains exactly the tokens that the model wrote. Completions
and last answers of the data are not read. A job that was killed is continued by the same command."""
FILE = "answers.jsonl"


def run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    if not 0 < flags.prompt_fraction < 1:
        raise UserError(f"--prompt_fraction {flags.prompt_fraction}: must be above 0 and below 1")
    reading, template = Reading(**given_to(Reading, flags)), template_options(flags)
    options = sampler_options(flags) | given(flags, "max_new_tokens")
    _check_model(flags.model, options, flags.num_answers)
    refuse_missing(flags.data)
    output = check_target(flags.output or Path(flags.output_dir, FILE), makes_directory=True)
    with slow_imports():
        from decausal.sampling.answers import load_writer, write_answers

    options |= given(flags, "num_prompts", "num_answers", "truncated", "prompt_fraction", *ENGINE_FLAGS)
    writer = load_writer(flags.model, **template)
    with progress_bar() as on_progress:
        result = write_answers(writer, flags.data, output, reading=reading, on_progress=on_progress, **options)
    print(f"[{_summary(result, output, flags.max_new_tokens)}]", file=sys.stderr)
    return 0


def _parser() -> VerbParser:
    parser = VerbParser("answers", DESCRIPTION)
    parser.add_argument("model", help="an AR model: a directory, hub id or GGUF file; or what `decausal convert` wrote")
    parser.add_argument("--data", required=True, help="prompts: a file, directory or data set, as for convert")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", metavar="FILE", help="the jsonl file to write")
    where.add_argument("--output_dir", metavar="DIR", help=f"the directory to write {FILE} into")
    parser.add_argument("--num_prompts", type=positive, help="how many prompts to answer, from the first (all)")
    parser.add_argument("--num_answers", type=positive, default=1, help="answers to each prompt, drawn separately (1)")
    parser.add_argument(
        "--max_new_tokens",
        "--gen_length",
        type=positive,
        default=MAX_NEW_TOKENS,
        help=f"longest answer, in tokens ({MAX_NEW_TOKENS})",
    )
    parser.add_argument(
        "--truncated",
        choices=TRUNCATED,
        default="keep",
        help="longer answers: keep what is written, trained without an end, or drop them (keep)",
    )
    parser.add_argument(
        "--prompt_fraction", type=float, default=0.5, help="share of a plain text that serves as its prompt (0.5)"
    )
    add_engine_flags(parser)
    add_reading_flags(parser)
    add_sampling_flags(parser, without=STOPS)
    add_template_flags(parser)
    return parser


def _check_model(name: str, options: dict[str, Any], num_answers: int) -> None:
    """Refuses what can be refused before the model is loaded. Nothing is known yet about a model on the hub."""
    check_model(name, options, may_be_source=True)
    if not is_left_to_the_hub(name):
        check_options(check_converted(name, may_be_source=True), options, num_answers)


def _summary(result: AnswersResult, output: Path, max_new_tokens: int) -> str:
    """Returns what was written, what was left out and why, and how fast it was."""
    counts = {
        "{} from before": result.num_resumed,
        "{} cut at " + f"{quantity(max_new_tokens, 'token')}, trained without an end": result.num_cut,
        "{} shortened to where their text encodes to the same tokens": result.num_shortened,
        "{} left out that were cut at " + quantity(max_new_tokens, "token"): result.num_dropped,
        "{} left out that are empty or encode to other tokens": result.num_lost,
        "{} refused" + f" ({result.refusal})": result.num_refused,
    }
    parts = [f"{quantity(result.num_written, 'answer')} written to {output}"]
    parts += [text.format(number) for text, number in counts.items() if number]
    speed = result.num_tokens / result.seconds if result.seconds else 0.0
    return ", ".join([*parts, f"{quantity(result.num_tokens, 'token')} at {speed:.1f} tokens/s"])
