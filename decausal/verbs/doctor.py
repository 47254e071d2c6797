"""The command `decausal doctor`."""

from __future__ import annotations

import json

from decausal.verbs.flags import VerbParser, slow_imports

DTYPES = ("float32", "bfloat16", "float16")


def run(arguments: list[str]) -> int:
    parser = VerbParser("doctor", "Check whether an AR model can be converted, or a converted one used.")
    parser.add_argument("model", help="a directory, a .gguf file, a hub id, or 'tiny'; a PEFT adapter is merged")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="type of the weights (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args(arguments)
    from decausal.models.names import check_source

    check_source(flags.model, flags.revision, may_be_converted=True, merge_adapter=True)
    with slow_imports():
        import torch

        from decausal.models.doctor import probes_as_dict, usable
        from decausal.models.examination import examine_path, probes_as_table

    probes = examine_path(flags.model, revision=flags.revision, dtype=getattr(torch, flags.dtype))
    if flags.json:
        print(json.dumps(probes_as_dict(probes), indent=2))
    else:
        from rich.console import Console

        Console().print(probes_as_table(flags.model, probes))
    return 0 if usable(probes) else 1
