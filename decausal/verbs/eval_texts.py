"""The command `decausal eval texts`."""

from __future__ import annotations

import json

from decausal.data.reading import Reading
from decausal.data.sources import refuse_missing
from decausal.verbs.flags import VerbParser, add_reading_flags, at_least, given, given_to, positive, slow_imports
from decausal.verbs.records import add_output_flag, check_output, keep_record
from decausal.verbs.sampling import add_sampling_flags, check_model, sampler_options

DESCRIPTION = """What a converted model writes after prompts: length, repetition, distinct n-grams and entropy, with the
perplexity under its AR source, and the same figures of what the AR source writes."""


def run(arguments: list[str]) -> int:
    parser = VerbParser("eval texts", DESCRIPTION)
    parser.add_argument("directory", help="what `decausal convert` wrote, or its id on the hub")
    parser.add_argument("--data", required=True, help="prompts: a file, directory or data set, as for convert")
    add_reading_flags(parser)
    parser.add_argument("--num_prompts", type=positive, help="how many prompts, from the first (32)")
    parser.add_argument("--max_new_tokens", type=positive, help="longest text, in tokens (128)")
    parser.add_argument("--max_length", type=at_least(2), help="longest prompt and text together (1024)")
    parser.add_argument("--batch_size", type=positive, help="rows written together (16)")
    parser.add_argument("--no_source", dest="with_source", action="store_false", help="leave the AR source out")
    add_sampling_flags(parser)
    add_output_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(arguments)
    check_output(flags.output)
    options = sampler_options(flags)
    check_model(flags.directory, options)
    refuse_missing(flags.data)
    reading = Reading(**given_to(Reading, flags))
    with slow_imports():
        from decausal.evaluation.texts import evaluate_texts

    options |= given(flags, "num_prompts", "max_new_tokens", "max_length", "batch_size")
    texts = evaluate_texts(flags.directory, flags.data, reading=reading, with_source=flags.with_source, **options)
    found = texts.as_dict()
    seeds = {"sampler": texts.sampler["seed"]}
    keep_record(flags.output, ["eval", "texts"], arguments, flags.directory, found, seeds=seeds, sampler=texts.sampler)
    if flags.json:
        print(json.dumps(found, indent=2))
    else:
        from rich.console import Console

        Console().print(texts.as_table())
    return 0
