"""decausal infill."""

from __future__ import annotations

from decausal.verbs.flags import VerbParser
from decausal.verbs.sampling import add_sampler_flags, print_generations, sampler_options, watching


def run(arguments: list[str]) -> int:
    parser = VerbParser("infill", "Write the missing middle of a text.")
    parser.add_argument("directory", help="what `decausal convert` wrote")
    parser.add_argument("--prefix", required=True, help="text before the gap")
    parser.add_argument("--suffix", required=True, help="text after the gap")
    parser.add_argument("--length", type=int, required=True, help="tokens in the gap")
    add_sampler_flags(parser)
    flags = parser.parse_args(arguments)
    from decausal.sampling.model import load

    model = load(flags.directory)
    with watching(model, flags.watch) as on_step:
        found = model.infill(flags.prefix, flags.suffix, flags.length, on_step=on_step, **sampler_options(flags))
    print_generations([found], as_json=flags.json)
    return 0
