"""The command `decausal chat`."""

from __future__ import annotations

import contextlib
import sys
from functools import partial

from decausal.verbs.flags import VerbParser, add_template_flags, given, slow_imports, template_options
from decausal.verbs.sampling import add_sampling_flags, check_model, sampler_options


def run(arguments: list[str]) -> int:
    parser = VerbParser("chat", "Talk to a converted model whose tokenizer has a chat template. /help lists commands.")
    parser.add_argument("directory", help="what `decausal convert` wrote, or its id on the hub")
    parser.add_argument("--system", help="the system's message")
    parser.add_argument("--max_new_tokens", "--gen_length", type=int, help="longest answer, in tokens (128)")
    parser.add_argument("--max_length", type=int, help="longest conversation (the model's context, at most 4096)")
    add_sampling_flags(parser)
    add_template_flags(parser)
    flags = parser.parse_args(arguments)
    template = template_options(flags)
    options = sampler_options(flags) | given(flags, "system", "max_new_tokens", "max_length")
    check_model(flags.directory, options)
    with slow_imports():
        from decausal.sampling.model import load
        from decausal.serving.conversation import Conversation
        from decausal.serving.terminal_chat import TerminalChat

    conversation = Conversation(load(flags.directory, **template).converted, **options)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - makes lines editable, and brings earlier ones back by the arrow keys
        print("/help lists the commands, Ctrl-D leaves")
    TerminalChat(conversation, partial(input, "> " if is_terminal else ""), partial(print, end="", flush=True)).run()
    return 0
