"""What the verbs that sample share: sampler flags, the live view, how a generation is printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from decausal.errors import UserError
from decausal.sampling.settings import CACHES, CONFIDENCES, ORDERS, REMASKINGS, SamplerSettings
from decausal.verbs.flags import given, positive

if TYPE_CHECKING:
    from decausal.sampling.jobs import OnStep, Progress


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    add_sampling_flags(parser)
    parser.add_argument("--batch_size", type=positive, default=16, help="rows written together (16)")
    parser.add_argument("--watch", action="store_true", help="show tokens as they are committed (one prompt)")
    parser.add_argument("--record", metavar="FILE", help="write an animation of it: .svg or .gif (one prompt)")
    parser.add_argument("--json", action="store_true", help="print JSON: text, ids, tokens per forward")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `sampler_options` reads."""
    parser.add_argument("--num_steps", "--steps", "--denoising_steps", type=int, help="denoising steps, spread evenly")
    parser.add_argument("--threshold", "--confidence_threshold", type=float, help="keep all that is as sure (0.9)")
    parser.add_argument("--entropy_bound", type=float, help="keep what is nearly independent, in nats")
    parser.add_argument("--confidence", choices=CONFIDENCES, help="what 'sure' means")
    parser.add_argument("--temperature", type=float, help="0 takes the most probable token (0)")
    parser.add_argument("--top_k", type=int, help="draw among this many of the most probable tokens")
    parser.add_argument("--top_p", type=float, help="draw among the fewest tokens with this probability")
    parser.add_argument("--min_p", type=float, help="least probability, as a share of the likeliest token's")
    parser.add_argument("--seed", type=int, help="the same seed writes the same text; text i draws from seed + i (0)")
    parser.add_argument("--stop", action="append", help="a text that ends a row; may be repeated")
    parser.add_argument(
        "--stop_token_ids", type=int, action="append", metavar="ID", help="a token that ends a row; may be repeated"
    )
    parser.add_argument(
        "--speculative", action="store_true", default=None, help="masks draft what the same weights verify causally"
    )
    parser.add_argument(
        "--first_token_from_clean",
        action=argparse.BooleanOptionalAction,
        help="keep a block's first token before the others are decided, as Fast-dLLM v2 does",
    )
    parser.add_argument("--order", choices=ORDERS, help="what is kept first (confidence)")
    parser.add_argument("--window", type=int, help="open positions that are decided at a time, left to right")
    parser.add_argument("--cache", choices=CACHES, help="what a pass inside a window does not read again (none)")
    parser.add_argument("--cache_refresh", type=int, help="passes after which the whole row is read again")
    parser.add_argument("--guidance", type=float, help="lead away from what the model writes without the prompt (0)")
    parser.add_argument(
        "--remask", action="store_const", const="p2", help="let kept tokens be reconsidered: --remasking p2"
    )
    parser.add_argument("--remasking", dest="remask", choices=("none", *REMASKINGS), help="how tokens are opened again")
    parser.add_argument("--remask_rate", type=float, help="of remdm and remdm_loop: chance of a kept token (0.02)")


def sampler_options(flags: argparse.Namespace) -> dict[str, Any]:
    return given(flags, *_OPTIONS)


_OPTIONS = (
    "num_steps",
    "threshold",
    "entropy_bound",
    "confidence",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "order",
    "window",
    "cache",
    "cache_refresh",
    "guidance",
    "remask",
    "remask_rate",
    "first_token_from_clean",
    "speculative",
)


def check_model(name: str, options: Mapping[str, Any], *, may_be_source: bool = False) -> None:
    """Refuses a wrong name, or sampler settings that a model which is here cannot honour, before anything is loaded.

    Args:
        name: a converted model's.
        options: of which only the sampler's settings are looked at.
        may_be_source: an AR model will do, whose settings are not looked at.
    """
    from decausal.models.names import check_converted
    from decausal.sampling.defaults import settings_for

    facts = check_converted(name, may_be_source=may_be_source)
    if facts is not None:
        settings_for(facts, **{key: options[key] for key in options if key in SamplerSettings.__dataclass_fields__})


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
    """Shows the steps in the terminal, writes them to a file, both or neither; yields what to call after each step."""
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


def print_generations(found: list[Any], as_json: bool) -> None:
    for generation in found:
        if as_json:
            print(json.dumps(vars(generation), ensure_ascii=False))
        else:
            print(generation.full_text)
            note = f"[{len(generation.ids)} tokens in {generation.num_forwards} forward passes]"
            print(note, file=sys.stderr)
