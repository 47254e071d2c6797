"""The command `decausal infill`."""

from __future__ import annotations

import json
import sys
from typing import Any

from decausal.errors import UserError
from decausal.verbs.flags import VerbParser, given, positive, slow_imports
from decausal.verbs.sampling import (
    add_sampler_flags,
    check_model,
    check_recording,
    passes_note,
    print_generations,
    sampler_options,
    watching,
)

DESCRIPTION = r"""Write what is missing in a text: one gap between --prefix and --suffix, or any number of gaps in
--text, where {gap} is a gap of unknown length, {gap:4} one of 4 tokens, and \{gap} these characters themselves."""


def run(arguments: list[str]) -> int:
    parser = VerbParser("infill", DESCRIPTION)
    parser.add_argument("directory", help="what `decausal convert` wrote, or its id on the hub")
    parser.add_argument("--prefix", help="text before the gap")
    parser.add_argument("--suffix", help="text after the gap")
    parser.add_argument(
        "--length", type=positive, help="tokens in the gap; unset: several lengths are tried and ranked"
    )
    parser.add_argument("--text", help=r"text with gaps, as in 'def f(x):{gap} return{gap:4}'")
    parser.add_argument("--max_gap", "--max_length", type=positive, help="most tokens of a gap of unknown length (32)")
    parser.add_argument("--length_search", choices=("candidates", "grow"), help="how lengths are found (candidates)")
    add_sampler_flags(parser)
    flags = parser.parse_args(arguments)
    if (flags.text is None) == (flags.prefix is None and flags.suffix is None):
        raise UserError("infill: give --prefix and --suffix, or --text with {gap} in it; see decausal infill --help")
    if flags.text is None and (flags.prefix is None or flags.suffix is None):
        raise UserError(
            f"infill: --{'suffix' if flags.suffix is None else 'prefix'} is missing: '' where there is none"
        )
    if flags.text is not None and flags.length is not None:
        raise UserError("infill: --length is for --prefix and --suffix; in --text write {gap:N}")
    check_recording(flags)
    from decausal.sampling.filling.gaps import parse_gaps

    pieces = None if flags.text is None else parse_gaps(flags.text)
    options = sampler_options(flags) | given(flags, "max_gap", "length_search", "batch_size")
    check_model(flags.directory, options)
    with slow_imports():
        from decausal.sampling.model import load

    model = load(flags.directory)
    with watching(model, flags.watch, flags.record) as on_step:
        if pieces is None:
            found = model.infill(flags.prefix, flags.suffix, flags.length, on_step=on_step, **options)
            print_generations([found], as_json=flags.json)
        else:
            _print(model.fill(pieces, on_step=on_step, **options), as_json=flags.json)
    return 0


def _print(filling: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(filling.as_dict(), ensure_ascii=False))
        return
    print(filling.full_text)
    lengths = " + ".join(map(str, filling.lengths))
    written = f"{lengths} token{'' if filling.lengths == [1] else 's'}"
    print(f"[{passes_note(written, filling.num_forwards)}]", file=sys.stderr)
