"""The command `decausal edit`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from decausal.errors import UserError
from decausal.verbs.flags import VerbParser, at_least, given, positive, slow_imports, text_from
from decausal.verbs.sampling import (
    add_sampler_flags,
    check_model,
    check_recording,
    passes_note,
    sampler_options,
    watching,
)
from decausal.wording import quantity


def run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    if flags.text is not None and flags.file is not None:
        raise UserError("edit: give a text or --file, not both")
    check_recording(flags)
    options = sampler_options(flags) | given(flags, "num_tokens", "fraction", "span", "find", "rounds", "groups")
    check_model(flags.directory, options)
    text = _text(flags)
    with slow_imports():
        from decausal.sampling.model import load

    model = load(flags.directory)
    with watching(model, flags.watch, flags.record) as on_step:
        edit = model.edit(text, batch_size=flags.batch_size, on_step=on_step, **options)
    _print(edit, flags)
    return 0


def _parser() -> VerbParser:
    parser = VerbParser("edit", "Rewrite what fits a text least, or a marked part of it, and show the difference.")
    parser.add_argument("directory", help="what `decausal convert` wrote, or its id on the hub")
    parser.add_argument("text", nargs="?", help="the text; unset: --file, or standard input")
    parser.add_argument("--file", help="a file in UTF-8 that holds the text; it is not changed")
    parser.add_argument("--num_tokens", type=at_least(0), help="how many tokens to rewrite in a round")
    parser.add_argument("--fraction", type=float, help="or what share of them (0.15; all of a marked part)")
    parser.add_argument("--span", type=_span, metavar="START:END", help="only these characters, counted from 0")
    parser.add_argument("--find", metavar="TEXT", help="only where this text occurs")
    parser.add_argument("--rounds", type=positive, help="how many times to choose and rewrite (1)")
    parser.add_argument("--groups", type=positive, help="passes in which the tokens are scored (8)")
    parser.add_argument("--text_only", action="store_true", help="print the new text alone, exactly as it is")
    add_sampler_flags(parser)
    return parser


def _span(written: str) -> tuple[int, int]:
    start, colon, end = written.partition(":")
    if not (colon and start.isdecimal() and end.isdecimal()):
        raise argparse.ArgumentTypeError(f"'{written}' is not START:END, such as 10:24")
    return int(start), int(end)


def _text(flags: argparse.Namespace) -> str:
    if flags.text is not None:
        return flags.text
    return text_from(flags.file, "edit")


def _print(edit: Any, flags: argparse.Namespace) -> None:
    from rich.console import Console

    from decausal.sampling.editing.changes import coloured_diff, word_diff

    if flags.json:
        print(json.dumps(edit.as_dict(), ensure_ascii=False))
        return
    if flags.text_only:
        sys.stdout.write(edit.text)
        return
    console = Console()
    if console.is_terminal:
        console.print(coloured_diff(edit.before, edit.changes), soft_wrap=True)
    else:
        print(word_diff(edit.before, edit.changes))
    note = f"{quantity(edit.num_rewritten, 'token')} rewritten, {quantity(len(edit.changes), 'change')}"
    print(f"[{passes_note(note, edit.num_forwards)}]", file=sys.stderr)
