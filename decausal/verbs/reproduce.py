"""The command `decausal reproduce`."""

from __future__ import annotations

from pathlib import Path

from decausal.errors import UserError
from decausal.verbs.flags import VerbParser

DESCRIPTION = """Run the evaluations of a report again, in this directory, and say what differs: figures, and what they
were made with. On a CPU with the same seed, versions and threads every figure but times is the same. Exit code 1 where
one is not."""


def run(arguments: list[str]) -> int:
    parser = VerbParser("reproduce", DESCRIPTION)
    parser.add_argument("report", help="the .json file of a report, or one that --output wrote")
    parser.add_argument("--only", metavar="N,...", help="only these evaluations, by their numbers in the report (all)")
    flags = parser.parse_args(arguments)
    from decausal.report.reproducing import recorded, reproduce

    evaluations = recorded(Path(flags.report).expanduser())
    chosen = _chosen(flags.only, len(evaluations))
    is_identical = True
    for number in chosen:
        found = reproduce(evaluations[number - 1])
        is_identical &= found.is_identical
        print(f"[{number}] " + "\n".join(found.lines()), flush=True)
    if not evaluations:
        print("the report holds no evaluation; of a run: decausal convert --recipe DIR/run.yaml --output_dir NEW")
    return 0 if is_identical else 1


def _chosen(only: str | None, count: int) -> list[int]:
    if only is None:
        return list(range(1, count + 1))
    numbers = only.split(",")
    for number in numbers:
        if not number.isdigit() or not 1 <= int(number) <= count:
            raise UserError(f"--only {only}: the report has evaluations 1 to {count}; give their numbers with commas")
    return [int(number) for number in numbers]
