"""Shared by the verbs that sample: sampler flags, the live view, printing of generations."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from decausal.errors import UserError
from decausal.sampling.settings import SETTINGS
from decausal.verbs.flags import at_least, given, positive
from decausal.wording import quantity

if TYPE_CHECKING:
    from decausal.sampling.job_files import OnProgress
    from decausal.sampling.jobs import Drafts, OnStep, Progress


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    add_sampling_flags(parser)
    parser.add_argument("--batch_size", type=positive, default=16, help="rows written together (16)")
    parser.add_argument("--watch", action="store_true", help="show tokens as they are committed (one prompt)")
    parser.add_argument("--record", metavar="FILE", help="write an animation of it: .svg or .gif (one prompt)")
    parser.add_argument("--json", action="store_true", help="print JSON: text, ids, tokens per forward")


def add_sampling_flags(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Adds the flags of sampler settings, which `sampler_options` reads: all but those named."""
    for name, setting in SETTINGS.items():
        for flag in () if name in without else setting.flags:
            names = flag.names if "dest" in flag.options else (f"--{name}", *flag.names)
            parser.add_argument(*names, **flag.options, help=flag.help)


ENGINE_FLAGS = ("max_rows", "max_length", "cuda_graphs", "prefix_cache_tokens")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags `ENGINE_FLAGS` of verbs that write many rows."""
    parser.add_argument("--max_rows", "--batch_size", type=positive, help="rows written together (16)")
    parser.add_argument("--max_length", type=at_least(2), help="longest row (the model's context, at most 4096)")
    parser.add_argument(
        "--cuda_graphs",
        action=argparse.BooleanOptionalAction,
        help="record the passes of block models (by default on a GPU, where it can be done)",
    )
    parser.add_argument(
        "--prefix_cache_tokens",
        type=at_least(0),
        help="where drafts are verified, tokens of shared beginnings to hold, so that they are read once (0)",
    )


def sampler_options(flags: argparse.Namespace) -> dict[str, Any]:
    return given(flags, *(name for name, setting in SETTINGS.items() if setting.flags and hasattr(flags, name)))


def check_model(name: str, options: Mapping[str, Any], *, may_be_source: bool = False) -> None:
    """Refuses a wrong name, or sampler settings that a local model does not support, before anything is loaded.

    Args:
        name: A converted model's name.
        options: Options, of which only sampler settings are checked.
        may_be_source: Whether an AR model is accepted, whose settings are not checked.
    """
    from decausal.models.names import check_converted
    from decausal.sampling.settings.of_model import settings_for

    facts = check_converted(name, may_be_source=may_be_source)
    if facts is not None:
        settings_for(facts, **{key: options[key] for key in options if key in SETTINGS})


def check_recording(flags: argparse.Namespace, num_texts: int = 1) -> None:
    """Refuses a recording that cannot be made, before anything is loaded."""
    if flags.record is None:
        return
    if num_texts > 1:
        raise UserError(f"--record shows one text being written, and {num_texts} are given: give one")
    from decausal.sampling.watching.recording_path import check_recording as check

    check(flags.record)


@contextmanager
def watching(model: Any, is_watched: bool, record: str | None = None) -> Iterator[OnStep | None]:
    """Shows the steps in the terminal, records them in a file, or both. Yields what to call after each step."""
    from decausal.sampling.watching.record import Recording
    from decausal.sampling.watching.watch import Watch

    with ExitStack() as stack:
        viewers: list[OnStep] = []
        if record is not None:
            viewers.append(stack.enter_context(Recording(record, model.tokenizer)))
        if is_watched:
            viewers.append(stack.enter_context(Watch(model.tokenizer)))

        def show(progress: Progress) -> None:
            for viewer in viewers:
                viewer(progress)

        yield show if viewers else None


@contextmanager
def progress_bar() -> Iterator[OnProgress | None]:
    """Shows a bar with the remaining time on standard error, if that is a terminal. Yields what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_generations(found: list[Any], as_json: bool, only_new: bool = False) -> None:
    """Prints texts, whole or only what is new, or as JSON. A note on each goes to standard error."""
    for generation in found:
        if as_json:
            drafts = None if generation.drafts is None else generation.drafts.as_dict()
            print(json.dumps({**vars(generation), "drafts": drafts}, ensure_ascii=False))
        else:
            print(generation.text if only_new else generation.full_text)
            note = passes_note(quantity(len(generation.ids), "token"), generation.num_forwards)
            print(f"[{note}{drafts_note(generation.drafts)}]", file=sys.stderr)


def passes_note(written: str, num_forwards: int) -> str:
    """Returns a note on what was written, and in how many passes."""
    return f"{written} in {quantity(num_forwards, 'forward pass', 'forward passes')}"


def drafts_note(drafts: Drafts | None) -> str:
    """Returns the end of a note on passes, about verified drafts."""
    return "" if drafts is None else f"; {drafts}"
