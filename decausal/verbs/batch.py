"""The command `decausal batch`."""

from __future__ import annotations

import sys

from decausal.sampling.job_files import check_job_files, holds_messages
from decausal.verbs.flags import (
    VerbParser,
    add_template_flags,
    given,
    slow_imports,
    template_options,
)
from decausal.verbs.sampling import (
    ENGINE_FLAGS,
    add_engine_flags,
    add_sampling_flags,
    check_model,
    drafts_note,
    progress_bar,
    sampler_options,
)
from decausal.wording import quantity

DESCRIPTION = """Continue every prompt of a jsonl file, {"prompt": ..., "id": ...} or {"messages": [...]} in each line,
with sampler settings of its own where wanted, and write the answers to another one in the same order. A job that was
killed is continued by the same command."""


def run(arguments: list[str]) -> int:
    parser = VerbParser("batch", DESCRIPTION)
    parser.add_argument("directory", help="what `decausal convert` wrote, or its id on the hub")
    parser.add_argument("prompts", help="the jsonl file to read")
    parser.add_argument("answers", help="the jsonl file to write")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    parser.add_argument("--max_new_tokens", "--gen_length", type=int, help="tokens to write (128)")
    add_engine_flags(parser)
    parser.add_argument("--on_error", choices=("stop", "record"), help="what a bad line does (stop)")
    add_sampling_flags(parser)
    add_template_flags(parser)
    flags = parser.parse_args(arguments)
    options = sampler_options(flags) | given(flags, "max_new_tokens", "on_error", *ENGINE_FLAGS)
    check_model(flags.directory, options)
    check_job_files(flags.prompts, flags.answers)
    template = template_options(flags, lambda: flags.chat or holds_messages(flags.prompts))
    with slow_imports():
        from decausal.sampling.model import load

    model = load(flags.directory, **template)
    with progress_bar() as on_progress:
        result = model.run_file(flags.prompts, flags.answers, chat=flags.chat, on_progress=on_progress, **options)
    notes = [f"{quantity(result.num_lines, 'answer')} in {flags.answers}"]
    notes += [f"{result.num_resumed} of them from before"] if result.num_resumed else []
    notes += [quantity(result.num_errors, "error")] if result.num_errors else []
    print(f"[{', '.join(notes)}{drafts_note(result.drafts)}]", file=sys.stderr)
    return 0
