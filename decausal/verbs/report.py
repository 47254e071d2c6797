"""The command `decausal report`."""

from __future__ import annotations

from pathlib import Path

from decausal.errors import UserError
from decausal.verbs.flags import VerbParser
from decausal.wording import quantity

DESCRIPTION = """One page over runs, evaluations and conversions: scores beside the AR source's, quality against speed,
training curves, texts, and how each figure was made. A JSON file beside it holds the same."""


def run(arguments: list[str]) -> int:
    parser = VerbParser("report", DESCRIPTION)
    parser.add_argument("paths", nargs="+", metavar="DIR", help="runs, converted models, and files that --output wrote")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page to write (report.html)")
    parser.add_argument("--title", default="decausal report", help="its title (decausal report)")
    flags = parser.parse_args(arguments)
    output = Path(flags.output).expanduser()
    if output.suffix != ".html":
        raise UserError(f"--output {flags.output}: name a file that ends with .html; the JSON goes beside it")
    from decausal.report.sources import find
    from decausal.report.write import write_report

    found = find(flags.paths)
    paths = write_report(found, output, flags.title)
    held = f"{quantity(len(found.runs), 'run')} and {quantity(len(found.evaluations), 'evaluation')}"
    print(f"{held} in {paths[0]} and {paths[1]}")
    return 0
