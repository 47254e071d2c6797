"""The sampler's settings: names, defaults, and what is refused."""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any

from decausal.errors import UserError, nearest, refuse_broken_text

CONFIDENCES = ("probability", "margin", "entropy")
SCHEDULES = ("num_steps", "threshold", "entropy_bound")
"""Of these a row follows one."""
DEFAULT_THRESHOLD = 0.9
ORDERS = ("confidence", "random", "left_to_right")
REMASKINGS = ("p2", "remdm", "remdm_loop")
DEFAULT_REMASK_RATE = 0.02
NUM_SEEDS = 2**62
"""Seeds that differ: any integer stands for the one that it is modulo this."""
COUNTS_BELOW = 2**31
"""Above any number of tokens or steps, and far enough below 2**63 that engines can compute with it."""
MOST_ROWS = 2**16
"""In one forward pass: an engine makes room for all of them at once."""
SMALLEST, LARGEST, LARGEST_GUIDANCE = 1e-20, 1e20, 1e6
"""Bounds of reals above 0. Engines compute in float32, where less would become 0, and more infinite: a logit times the
largest guidance over the smallest temperature is still finite."""
CACHES = ("none", "prefix", "dual")
BIDIRECTIONAL_ONLY = ("order", "window", "cache", "guidance", "remask")
"""What only models that read in both directions, and are denoised as whole rows, can honour."""
BLOCKS_ONLY = ("first_token_from_clean",)
"""What only models that are written block by block, the state before a token predicting it, can honour."""

ALIASES = {
    "confidence_threshold": "threshold",
    "denoising_steps": "num_steps",
    "gen_length": "max_new_tokens",
    "num_denoising_steps": "num_steps",
    "remasking": "remask",
    "steps": "num_steps",
}
"""Names that other samplers use, and ours."""


@dataclass(frozen=True)
class SamplerSettings:
    """How open positions become tokens.

    Attributes:
        max_new_tokens: Open positions after a prompt.
        num_steps: Static schedule: a row's open positions are kept in this many steps, spread evenly (one per step
            where there are fewer positions than steps). For block models: the open positions of each block.
        threshold: Dynamic schedule: a step keeps every position at least this confident, and at least one per row.
            Where no schedule is given it is 0.9.
        entropy_bound: Dynamic schedule, in nats: a step keeps positions in the order of their entropies, the lowest
            first, while those of all but the last sum to at most this: a bound on what is lost by drawing them
            independently. 0 keeps one per row. Source: EB-sampler (arXiv 2505.24857), entropy as the proxy for error.
            The three schedules exclude each other.
        confidence: "probability", "margin" or "entropy": see `decausal.sampling.confidence`.
        temperature: 0 takes the most probable token. Positions are ordered by the untempered distribution throughout.
        top_k: Sample among the k most probable tokens.
        top_p: Sample among the fewest tokens whose probabilities sum to this.
        min_p: Sample only among tokens at least this many times as probable as the likeliest one, by the untempered
            distribution: a high temperature lets no other in. Applied before `top_k` and `top_p`.
        seed: Row i of a call draws from seed + i, so one row can be had again alone. Any integer, taken modulo 2**62.
        order: Which candidates are kept first: "confidence" the surest; "random" any, drawn anew in each step;
            "left_to_right". The last two go with `num_steps` alone, since the other schedules speak of confidence.
        window: Open positions that are decided at a time, left to right: only these are kept, and the next window
            begins when all of them are. Each window has its share of `num_steps`, at least one step. None: all at once.
            Source: semi-autoregressive decoding, LLaDA (arXiv 2502.09992).
        cache: What a pass inside a window does not read again, but takes from the last pass that read the whole row:
            "prefix" keys and values of all before the window, "dual" also those behind it. An approximation: they were
            made when fewer tokens were known. Needs `window`. Source: Fast-dLLM (arXiv 2505.22618).
        cache_refresh: Every so many passes reads the whole row, as the first pass of each window does; 1 is exact.
            None: only that one.
        guidance: w in logits = without + (1 + w) (with - without), "without" from the same row with all that was given
            masked. Above 0 each step costs a second pass. Source: LLaDA (arXiv 2502.09992), after Ho and Salimans 2022.
        remask: Whether kept tokens may be opened again (in the current window alone). False: never. "p2" (or True):
            every step scores kept tokens anew, each by its own probability now, and keeps the best of all; what is
            kept grows every step. Not with `entropy_bound`. Source: P2 (arXiv 2502.03540), the model its own planner.
            "remdm": every step opens each kept token with probability `remask_rate`, less where no steps are left to
            keep it again. "remdm_loop": tokens are kept up to 0.9 of the positions in the first 0.45 of the steps; then
            tokens are opened and others kept until 0.95 of them; then the rest is kept. Both go with `num_steps`, and
            more steps than positions are more chances to correct. Source: ReMDM (arXiv 2503.00307), its schedules
            "cap" and "loop", with counts that are even in place of random ones.
        remask_rate: Of "remdm" and "remdm_loop"; there 0.02 where it is not given.
        stop: Texts that end a row; the text stops before them. One string, or several. They may hold special tokens.
        stop_token_ids: Tokens that end a row, beside those that end the model's texts; the text stops before them.
        first_token_from_clean: A block's first token is kept in a step of its own, from the state of the finished token
            before it; the others are decided when it is known. Of models with layout "block" and shift 1. That step is
            the first of `num_steps`; where there is only one, a second follows. Source: Fast-dLLM v2
            (arXiv 2509.26328), its code.
        speculative: Write what the same weights write under causal attention: masks draft several tokens, and the same
            pass verifies those drafted before. Temperature, top_k, top_p and min_p hold; schedules play no part. See
            `decausal.sampling.blocks.speculative`.

    Raises:
        UserError: A value outside its range, or settings that exclude each other.
    """

    max_new_tokens: int = 128
    num_steps: int | None = None
    threshold: float | None = None
    entropy_bound: float | None = None
    confidence: str = "probability"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    order: str = "confidence"
    window: int | None = None
    cache: str = "none"
    cache_refresh: int | None = None
    guidance: float = 0.0
    remask: bool | str = False
    remask_rate: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    first_token_from_clean: bool = False
    speculative: bool = False

    def __post_init__(self) -> None:
        given = [name for name in SCHEDULES if getattr(self, name) is not None]
        if len(given) > 1:
            values = " and ".join(f"{name}={getattr(self, name)}" for name in given)
            raise UserError(
                f"{values} exclude each other: give num_steps for a fixed number of steps, threshold to keep whatever "
                "is sure enough, or entropy_bound to keep what is nearly independent"
            )
        if not given:
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD)
        for name, settle in _SETTLED.items():
            object.__setattr__(self, name, settle(getattr(self, name)))
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        schedule = f"{self.schedule}={getattr(self, self.schedule)}"
        if self.order != "confidence" and self.schedule != "num_steps":
            raise UserError(
                f"order={self.order!r} goes with num_steps, not with {schedule}: that schedule keeps what is surest; "
                "give num_steps"
            )
        if self.is_remdm and self.schedule != "num_steps":
            raise UserError(
                f"remask={self.remask!r} goes with num_steps, not with {schedule}: its rates follow the steps that are "
                "left; give num_steps, or remask='p2'"
            )
        if self.remask == "p2" and self.entropy_bound is not None:
            raise UserError(
                "remask and entropy_bound exclude each other: the bound speaks of positions that are open; "
                "give num_steps or threshold with remask"
            )
        if self.remask == "p2" and self.order != "confidence":
            raise UserError(
                f"remask='p2' keeps the surest of all tokens, so order={self.order!r} has no say; leave order out, or "
                "give remask='remdm'"
            )
        if self.remask_rate is not None and not self.is_remdm:
            raise UserError(f"remask_rate={self.remask_rate} is for remask='remdm' and 'remdm_loop'; give one of them")
        if self.cache != "none" and self.window is None:
            raise UserError(
                f"cache={self.cache!r} needs window: it holds keys and values of what is outside of it; give window"
            )
        without_say = self._given(*BIDIRECTIONAL_ONLY, *BLOCKS_ONLY)
        if self.speculative and without_say:
            raise UserError(
                f"{without_say[0]} has no say in speculative decoding, which writes from left to right; "
                "leave one of them out"
            )
        if self.cache_refresh is not None and self.cache == "none":
            raise UserError(f"cache_refresh={self.cache_refresh} needs cache='prefix' or cache='dual'; give one")

    @property
    def has_stops(self) -> bool:
        """Texts or tokens end a row."""
        return bool(self.stop or self.stop_token_ids)

    @property
    def is_remdm(self) -> bool:
        """Kept tokens are opened at random."""
        return self.remask in ("remdm", "remdm_loop")

    def refuse_speculative(self) -> None:
        """Refuses self-speculation where rows are denoised.

        Raises:
            UserError: It was asked for.
        """
        if self.speculative:
            raise UserError(
                "speculative is for continuing prompts: it writes from left to right, without steps of denoising; "
                "leave it out"
            )

    @property
    def schedule(self) -> str:
        """The one of `SCHEDULES` that is followed."""
        return next(name for name in SCHEDULES if getattr(self, name) is not None)

    def refuse_layout(self, layout: str, shift: int | None = 1) -> None:
        """Refuses what a model of this layout and shift cannot honour.

        Raises:
            UserError: Names the setting, why, and which models can.
        """
        if self.first_token_from_clean and (layout != "block" or shift == 0):
            raise UserError(
                f"first_token_from_clean is not possible under layout '{layout}' with shift {shift}: only in a model "
                "with layout 'block' and shift 1 does a finished token predict a block's first one; leave it out"
            )
        if layout == "bidirectional":
            return
        if layout == "causal" and self.speculative:
            raise UserError(
                "speculative decoding drafts with masks, and a model of layout 'causal' has learnt none; leave it out"
            )
        for name in self._given(*BIDIRECTIONAL_ONLY):
            raise UserError(
                f"{name} is not possible under layout '{layout}': {_WHY_NOT[layout]}; leave it out, or sample from "
                "a model with layout 'bidirectional'"
            )

    def _given(self, *names: str) -> list[str]:
        """Those of the settings that are not as they are by default."""
        return [name for name in names if getattr(self, name) != _default(name)]

    def updated(self, **options: Any) -> SamplerSettings:
        """Returns these settings with `options` over them.

        Aliases are understood. A schedule replaces the others; where remasking or the cache is switched off, or
        `speculative` switched on, what then has no say goes, too.

        Raises:
            UserError: An unknown name (the nearest is named), one setting given under two names, or a bad value.
        """
        changes = canonical(options)
        if any(changes.get(name) is not None for name in SCHEDULES):
            changes = dict.fromkeys(SCHEDULES) | changes
        changes |= {name: settle(changes[name]) for name, settle in _SETTLED.items() if name in changes}
        if changes.get("speculative") is True:
            changes = {
                name: _default(name) for name in (*BIDIRECTIONAL_ONLY, *BLOCKS_ONLY, *_DETAILS.values())
            } | changes
        for name, detail in _DETAILS.items():
            if name in changes and not _takes_detail(changes[name]):
                changes.setdefault(detail, None)
        for name, value in changes.items():
            _check(name, value)
            changes[name] = float(value) if name in _REAL and value is not None else value
        return dataclasses.replace(self, **changes)


def canonical(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options under our names for them."""
    accepted = {field.name for field in dataclasses.fields(SamplerSettings)}
    renamed: dict[str, Any] = {}
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if name not in accepted:
            hint = nearest(given, accepted | ALIASES.keys()) or f"; accepted: {', '.join(sorted(accepted))}"
            raise UserError(f"unknown sampler setting '{given}'{hint}")
        if name in renamed:
            raise UserError(f"{name} is given twice: '{given}' is another name for it")
        renamed[name] = value
    return renamed


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _as_texts(stop: Any) -> Any:
    """One text or a list of them as a tuple; anything else is left for the check to refuse."""
    if stop is None:
        return ()
    for text in [stop] if isinstance(stop, str) else stop if isinstance(stop, list | tuple) else ():
        if isinstance(text, str):
            refuse_broken_text(text, "stop")
    if isinstance(stop, str):
        return (stop,)
    return tuple(stop) if isinstance(stop, list) else stop


def _as_token_ids(ids: Any) -> Any:
    """One id or a list of them as a tuple; anything else is left for the check to refuse."""
    if ids is None:
        return ()
    if _is_integer(ids):
        return (int(ids),)
    return tuple(ids) if isinstance(ids, list) else ids


def _default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(SamplerSettings) if field.name == name)


def _takes_detail(value: Any) -> bool:
    return value in ("prefix", "dual", "remdm", "remdm_loop")


def _as_remasking(remask: Any) -> Any:
    """P2 by its older name, True; "none" where a word is wanted for False."""
    return {True: "p2", "none": False}.get(remask, remask) if isinstance(remask, bool | str) else remask


def _as_seed(seed: Any) -> Any:
    return int(seed) % NUM_SEEDS if _is_integer(seed) else seed


_SETTLED = {"stop": _as_texts, "stop_token_ids": _as_token_ids, "remask": _as_remasking, "seed": _as_seed}
_DETAILS = {"cache": "cache_refresh", "remask": "remask_rate"}
_WHY_NOT = {
    "block": "a block model is written block by block, each from the exact cache of those before it, and what is "
    "finished is never opened again",
    "causal": "a causal model does not see what is behind a token",
}
_REAL = ("threshold", "entropy_bound", "temperature", "top_p", "min_p", "guidance", "remask_rate")
_OPTIONAL = (*SCHEDULES, "top_k", "top_p", "min_p", "window", "cache_refresh", "remask_rate")
_IS_COUNT = (lambda value: _is_integer(value) and 1 <= value < COUNTS_BELOW, "an integer of at least 1 and below 2**31")
_IS_SHARE = (lambda value: _is_number(value) and SMALLEST <= value <= 1, f"a number from {SMALLEST:g} to 1")
_IS_AMOUNT = (
    lambda value: _is_number(value) and (value == 0 or SMALLEST <= value <= LARGEST),
    f"0, or a number from {SMALLEST:g} to {LARGEST:g}",
)
_RULES = {
    "max_new_tokens": _IS_COUNT,
    "num_steps": _IS_COUNT,
    "threshold": _IS_SHARE,
    "entropy_bound": _IS_AMOUNT,
    "confidence": (lambda value: value in CONFIDENCES, f"one of {', '.join(CONFIDENCES)}"),
    "temperature": _IS_AMOUNT,
    "top_k": _IS_COUNT,
    "top_p": _IS_SHARE,
    "min_p": (
        lambda value: _is_number(value) and (value == 0 or SMALLEST <= value <= 1),
        f"0, or a number from {SMALLEST:g} to 1",
    ),
    "seed": (_is_integer, "an integer"),
    "order": (lambda value: value in ORDERS, f"one of {', '.join(ORDERS)}"),
    "window": _IS_COUNT,
    "cache": (lambda value: value in CACHES, f"one of {', '.join(CACHES)}"),
    "cache_refresh": _IS_COUNT,
    "guidance": (
        lambda value: _is_number(value) and (value == 0 or SMALLEST <= value <= LARGEST_GUIDANCE),
        f"0, or a number from {SMALLEST:g} to {LARGEST_GUIDANCE:g}",
    ),
    "remask": (
        lambda value: value is False or (isinstance(value, str) and value in REMASKINGS),
        f"True, False, or one of {', '.join(REMASKINGS)}",
    ),
    "remask_rate": _IS_SHARE,
    "stop": (
        lambda value: isinstance(value, tuple) and all(isinstance(text, str) and text for text in value),
        "a text that is not empty, or several",
    ),
    "stop_token_ids": (
        lambda value: isinstance(value, tuple) and all(_is_integer(token) and token >= 0 for token in value),
        "a token id of at least 0, or several",
    ),
    "first_token_from_clean": (lambda value: isinstance(value, bool), "True or False"),
    "speculative": (lambda value: isinstance(value, bool), "True or False"),
}


def _check(name: str, value: Any) -> None:
    is_accepted, accepted = _RULES[name]
    if not (is_accepted(value) or (value is None and name in _OPTIONAL)):
        raise UserError(f"{name}={_shown(value)} is not accepted: it must be {accepted}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "(thousands of digits)"
    return text if len(text) <= 80 else f"{text[:77]}..."
