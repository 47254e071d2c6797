"""The command `decausal serve`."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from importlib.util import find_spec

from decausal.errors import UserError
from decausal.serving.settings import ServeSettings
from decausal.verbs.flags import VerbParser, add_template_flags, given_to, slow_imports, template_options
from decausal.verbs.sampling import check_model

EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def run(arguments: list[str]) -> int:
    parser = VerbParser("serve", "Answer OpenAI's clients, and show a page to play on, from a converted model.")
    parser.add_argument("directory", help="what `decausal convert` wrote, or its id on the hub")
    parser.add_argument("--host", help="address to listen on (127.0.0.1: this machine alone; 0.0.0.0: everybody)")
    parser.add_argument("--port", type=int, help="0 takes a free one (8000)")
    parser.add_argument("--max_rows", type=int, help="rows written together (16)")
    parser.add_argument("--max_queue", type=int, help="rows that may wait; more are refused with status 429 (1024)")
    parser.add_argument("--max_total_tokens", type=int, help="longest row (the model's context, at most 4096)")
    parser.add_argument("--timeout", type=float, help="seconds that one request may take, the wait included (300)")
    parser.add_argument("--drain", type=float, help="seconds that answers may continue after a signal to end (5)")
    parser.add_argument("--api_key", help="what clients must send; better in the environment: DECAUSAL_API_KEY")
    parser.add_argument(
        "--allowed_hosts", help="further names that clients call it by, separated by commas; * for every one"
    )
    parser.add_argument("--model_name", help="the name that clients know (the directory's)")
    parser.add_argument(
        "--cuda_graphs",
        action=argparse.BooleanOptionalAction,
        help="record the passes of block models (by default on a GPU, where it can be done)",
    )
    parser.add_argument(
        "--compile_layers",
        action=argparse.BooleanOptionalAction,
        help="compile the layers of block models for recorded passes on a GPU: minutes at the start, fewer kernels",
    )
    parser.add_argument(
        "--prefix_cache_tokens",
        type=int,
        help="where drafts are verified, tokens of shared beginnings to hold, so that they are read once (0)",
    )
    parser.add_argument("--with_source", action="store_true", help="also serve the AR model it was made from")
    add_template_flags(parser)
    flags = parser.parse_args(arguments)
    from_environment = {"api_key": os.environ["DECAUSAL_API_KEY"]} if os.environ.get("DECAUSAL_API_KEY") else {}
    if flags.allowed_hosts is not None:
        flags.allowed_hosts = tuple(name.strip() for name in flags.allowed_hosts.split(","))
    template_options(flags)  # refuses a template that cannot be read
    settings = ServeSettings(**from_environment | given_to(ServeSettings, flags))
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise UserError(
            f"serve needs {', '.join(missing)}, which the extra 'serve' brings: pip install 'decausal[serve]'"
        )
    check_model(flags.directory, {})
    with slow_imports():
        from decausal.serving.server import serve

    tell = partial(_tell, open_to=settings.host if settings.api_key is None else None)
    serve(flags.directory, settings, with_source=flags.with_source, on_listening=tell)
    return 0


def _tell(address: str, names: list[str], open_to: str | None) -> None:
    from decausal.serving.hosts import is_public

    print(f"{' and '.join(names)}: {address} is the page, {address}/v1 the address for OpenAI's clients", flush=True)
    if open_to is not None and is_public(open_to):
        warning = f"warning: whoever reaches {open_to} can use this server: set a key in DECAUSAL_API_KEY"
        print(warning, file=sys.stderr, flush=True)
    print("Ctrl-C ends", file=sys.stderr, flush=True)
