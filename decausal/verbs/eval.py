"""decausal eval."""

from __future__ import annotations

import json

from decausal.errors import UserError
from decausal.verbs.flags import VerbParser, wants_help


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] != "nll":
        asked = f"'{arguments[0]}' is not known" if arguments and not wants_help(arguments) else "name what to measure"
        raise UserError(f"eval: {asked}; there is: decausal eval nll DIR --data DATA")
    parser = VerbParser("eval nll", "Likelihood of held-out text under a converted model, beside its AR source.")
    parser.add_argument("directory", help="what `decausal convert` wrote")
    parser.add_argument("--data", required=True, help="text, as for convert; 'stdlib-heldout' is at hand everywhere")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--max_length", type=int, default=512, help="tokens in a row (512)")
    parser.add_argument("--num_rows", type=int, default=64, help="rows to measure on (64)")
    parser.add_argument("--samples_per_row", type=int, default=8, help="mask patterns per row (8)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_source", action="store_true", help="leave out the AR source's own likelihood")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(arguments[1:])
    from decausal.evaluation.likelihood import evaluate_checkpoint

    likelihood = evaluate_checkpoint(
        flags.directory,
        flags.data,
        text_field=flags.text_field,
        max_length=flags.max_length,
        num_rows=flags.num_rows,
        samples_per_row=flags.samples_per_row,
        batch_size=flags.batch_size,
        seed=flags.seed,
        with_source=not flags.no_source,
    )
    if flags.json:
        print(json.dumps(likelihood.as_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(likelihood.as_table())
    return 0
