"""The command line: finds the verb, and prints errors on one line. Each verb is a module of `verbs`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from pathlib import Path

from decausal.errors import UserError, one_of

_warning_for_developers = warnings.formatwarning
DESCRIPTION = """\
Turn an autoregressive language model into a diffusion language model.

  decausal demo                        watch it happen on the model that comes with decausal, in minutes
  decausal convert MODEL --data DATA --output_dir OUT [--recipe repr-align]
                                       convert your own; `decausal convert --help` lists the settings
  decausal plan MODEL [--recipe R]     what that will need: memory by component, operations, hours; --gpu h100
  decausal generate DIR PROMPT         continue a text with a converted model
  decausal infill DIR --prefix A --suffix B [--length N]
                                       fill a gap in a text, or many: --text "def f(x): {gap} return {gap:4}"
  decausal edit DIR TEXT [--num_tokens N | --find A]
                                       rewrite what fits a text least, or a part of it, and show the difference
  decausal chat DIR                    talk to it; Ctrl-C stops an answer
  decausal batch DIR IN.jsonl OUT.jsonl
                                       continue a file of prompts, in order; a killed job can be continued
  decausal answers MODEL --data PROMPTS --output FILE
                                       a model's own answers to prompts, as training data for any recipe
  decausal serve DIR                   a page to play on, and a server for OpenAI's clients
  decausal eval nll DIR --data DATA    NELBO, bits per byte, masked cross-entropy by noise level
  decausal eval tasks MODEL            share of right answers to small tasks, tokens per forward pass
  decausal eval harness DIR --tasks A,B
                                       public benchmarks, by lm-evaluation-harness, beside the AR source
  decausal eval texts DIR --data PROMPTS
                                       what it writes: length, repetition, entropy, perplexity under its AR source
  decausal sweep DIR --over threshold=0.5,0.7,0.9
                                       quality against speed, the AR source and verified decoding beside it
  decausal report DIR...               one page over runs and evaluations; `reproduce` runs it again
  decausal reproduce REPORT            run a report's evaluations again, and say what differs
  decausal export DIR --format sdar|hf --output_dir OUT
                                       hand it on: to SGLang and LMDeploy, or with a model card to the hub
  decausal import MODEL --output_dir OUT
                                       take over a public diffusion model: SDAR, Dream, LLaDA, Fast-dLLM v2
  decausal compare [MODEL] --recipes A,B --output_dir OUT
                                       several recipes at a matched budget: quality by training tokens and by speed
  decausal doctor MODEL                can this model be converted, or used? every check, as a table
  decausal pretrain --output_dir OUT   train a small AR model from nothing
"""

VERBS = (
    "demo",
    "convert",
    "plan",
    "generate",
    "infill",
    "edit",
    "chat",
    "batch",
    "answers",
    "serve",
    "eval",
    "sweep",
    "report",
    "reproduce",
    "compare",
    "export",
    "import",
    "doctor",
    "pretrain",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, or 2 for bad input, which prints one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _keep_bars_out_of_files()
    warnings.formatwarning = _warning_for_users
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where installed, it warns of kernels that nothing uses
    try:
        try:
            return _dispatch(arguments)
        finally:
            sys.stdout.flush()  # here, where a broken pipe can be handled; argparse prints help and exits
    except BrokenPipeError:
        _write_nowhere()
        return 128 + signal.SIGPIPE
    except UserError as error:
        if os.environ.get("DECAUSAL_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"decausal: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("decausal: interrupted", file=sys.stderr)
        return 130


def _write_nowhere() -> None:
    """Discards what is still in the buffer, since the reader of the output has left, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _keep_bars_out_of_files() -> None:
    """Turns off the libraries' progress bars if there is no terminal, so that an error is the only line on stderr."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _warning_for_users(
    message: Warning | str, category: type[Warning], file: str, number: int, line: str | None = None
) -> str:
    """Returns a warning of ours as one line: users have no use for the place in the code that raised it."""
    if Path(file).is_relative_to(Path(__file__).parent):
        return f"decausal: warning: {' '.join(str(message).split())}\n"
    return _warning_for_developers(message, category, file, number, line)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(DESCRIPTION, end="")
        return 0
    if arguments[0] == "--version":
        print(f"decausal {_version()}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"unknown verb '{verb}'{one_of(verb, VERBS, 'verbs')}")
    name = f"{verb}_" if iskeyword(verb) else verb
    return import_module(f"decausal.verbs.{name}").run(rest)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("decausal")
    except PackageNotFoundError:
        return "(run from its source, not installed)"
