"""Orders other than by confidence, and decode windows, on models whose distributions are written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decausal.errors import UserError
from decausal.sampling.settings import SamplerSettings
from tests.sampling.denoising import Denoised, denoise
from tests.sampling.stand_ins import conversion_facts, sure_of, written

VOCAB_SIZE = 5


def run(
    table: list[list[float]], is_open: list[list[bool]], steps: list[Tensor] | None = None, **options: Any
) -> Denoised:
    """Denoises rows given as token 0; `steps` collects what is masked after each step."""
    with pytest.MonkeyPatch.context() as patch:
        model = written(patch, table)
        opened = torch.tensor(is_open)
        watch = None if steps is None else lambda step, ids, masked, new: steps.append(masked)
        return denoise(
            model,
            conversion_facts(VOCAB_SIZE),
            torch.zeros_like(opened, dtype=torch.long),
            opened,
            SamplerSettings().updated(**options),
            on_step=watch,
        )


def rising(length: int, *, is_reversed: bool = False) -> list[list[float]]:
    """Each position is surer of its token than the one before it, or less sure."""
    table = [sure_of(1, 0.3 + 0.6 * place / length, VOCAB_SIZE) for place in range(length)]
    return table[::-1] if is_reversed else table


SEEN = st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3)


@settings(max_examples=15, deadline=None)
@given(is_open=SEEN, num_steps=st.integers(1, 12))
def test_from_left_to_right_no_position_is_kept_before_one_on_its_left(is_open: Any, num_steps: int) -> None:
    denoised = run(rising(9), is_open, order="left_to_right", num_steps=num_steps)
    for steps, opened in zip(denoised.step_of_token, torch.tensor(is_open), strict=True):
        kept = steps[opened]
        assert (kept.diff() >= 0).all()
        assert kept.numel() == 0 or kept.max() + 1 == min(num_steps, len(kept))


@settings(max_examples=15, deadline=None)
@given(is_open=SEEN, num_steps=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_a_random_order_is_a_matter_of_the_seed_and_not_of_the_model(is_open: Any, num_steps: int, seed: int) -> None:
    options = {"order": "random", "num_steps": num_steps, "seed": seed}
    upward, downward = (run(rising(9, is_reversed=order), is_open, **options) for order in (False, True))
    assert torch.equal(upward.step_of_token, downward.step_of_token)
    assert torch.equal(upward.ids, downward.ids)


def test_in_a_random_order_every_position_is_equally_likely_the_first() -> None:
    num_rows = 6000
    first = run(rising(6), [[True] * 6] * num_rows, order="random", num_steps=6).step_of_token.argmin(1)
    counts, expected = first.bincount(minlength=6), num_rows / 6
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees of freedom, 0.999


def windows_of(opened: Tensor, size: int) -> Tensor:
    return (opened.cumsum(0) - 1) // size


@settings(max_examples=15, deadline=None)
@given(
    is_open=SEEN,
    window=st.integers(1, 10),
    options=st.sampled_from(
        [
            {"num_steps": 1},
            {"num_steps": 4},
            {"num_steps": 20},
            {"threshold": 0.6},
            {"entropy_bound": 1.0},
            {"num_steps": 5, "remask": "p2"},
            {"threshold": 0.5, "remask": "p2"},
            {"num_steps": 12, "remask": "remdm", "remask_rate": 0.5},
            {"num_steps": 20, "remask": "remdm_loop", "remask_rate": 0.5},
            {"num_steps": 6, "order": "random"},
        ]
    ),
)
def test_a_window_begins_when_the_one_before_it_is_full(is_open: Any, window: int, options: dict[str, Any]) -> None:
    steps: list[Tensor] = []
    denoised = run(rising(9), is_open, steps, window=window, temperature=1.0, **options)
    opened = torch.tensor(is_open)
    before = opened
    for masked in steps:
        for row in range(len(opened)):
            if before[row].any():
                number = windows_of(opened[row], window)
                current = int(number[before[row]].min())
                changed = number[before[row] ^ masked[row]]
                assert (changed == current).all()
        before = masked
    assert not before.any()
    assert ((denoised.step_of_token >= 0) == opened).all()


@settings(max_examples=15, deadline=None)
@given(is_open=SEEN, window=st.integers(1, 10), num_steps=st.integers(1, 14))
def test_windows_share_the_steps_and_have_one_each_at_least(is_open: Any, window: int, num_steps: int) -> None:
    denoised = run(rising(9), is_open, window=window, num_steps=num_steps)
    for row, opened in enumerate(torch.tensor(is_open)):
        num_open = int(opened.sum())
        num_windows = -(-num_open // window)
        assert denoised.num_forwards[row] == max(min(num_steps, num_open), num_windows)
        number, steps = windows_of(opened, window)[opened], denoised.step_of_token[row][opened]
        for each in number.unique():
            counts = steps[number == each].unique(return_counts=True)[1]
            assert counts.max() - counts.min() <= 1  # even within the window


@settings(max_examples=15, deadline=None)
@given(is_open=SEEN, options=st.sampled_from([{"num_steps": 4}, {"threshold": 0.6}, {"num_steps": 5, "remask": "p2"}]))
def test_a_window_as_long_as_the_row_is_none(is_open: Any, options: dict[str, Any]) -> None:
    wide, none = (run(rising(9), is_open, window=window, temperature=1.0, **options) for window in (9, None))
    assert torch.equal(wide.ids, none.ids)
    assert torch.equal(wide.step_of_token, none.step_of_token)
    assert torch.equal(wide.num_forwards, none.num_forwards)


def test_windows_of_one_position_go_from_left_to_right() -> None:
    is_open = [[False, True, True, True, False, True]]
    window = run(rising(6), is_open, window=1, threshold=0.1)
    ordered = run(rising(6), is_open, order="left_to_right", num_steps=4)
    assert torch.equal(window.step_of_token, ordered.step_of_token)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": "random"}, "goes with num_steps, not with threshold=0.9"),
        ({"order": "left_to_right", "entropy_bound": 1.0}, "goes with num_steps"),
        ({"order": "random", "num_steps": 3, "remask": "p2"}, "keeps the surest"),
        ({"remask": "remdm"}, "goes with num_steps, not with threshold=0.9"),
        ({"remask_rate": 0.1}, "is for remask='remdm'"),
        ({"remask": "p2", "remask_rate": 0.1}, "is for remask='remdm'"),
        ({"cache": "dual"}, "needs window"),
        ({"window": 4, "cache_refresh": 2}, "needs cache='prefix'"),
        ({"order": "upwards"}, "one of confidence, random, left_to_right"),
        ({"window": 0}, "an integer of at least 1"),
        ({"window": 2.5}, "an integer of at least 1"),
        ({"cache": "all"}, "one of none, prefix, dual"),
        ({"cache_refresh": 0}, "an integer of at least 1"),
        ({"guidance": -1}, "0, or a number from 1e-20 to"),
        ({"guidance": float("inf")}, "0, or a number from 1e-20 to"),
        ({"remask": "always"}, "True, False, or one of p2, remdm, remdm_loop"),
        ({"remask": 1}, "True, False, or one of"),
        ({"remask_rate": 0}, "from 1e-20 to 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        SamplerSettings().updated(**options)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("layout", ["block", "causal"])
@pytest.mark.parametrize(
    "options",
    [
        {"order": "random", "num_steps": 4},
        {"window": 4},
        {"window": 4, "cache": "prefix"},
        {"guidance": 1.0},
        {"remask": True},
    ],
)
def test_what_a_layout_cannot_honour_is_refused_with_the_one_that_can(layout: str, options: dict[str, Any]) -> None:
    settings = SamplerSettings().updated(**options)
    settings.refuse_layout("bidirectional")
    with pytest.raises(UserError, match=f"is not possible under layout '{layout}'.*'bidirectional'$"):
        settings.refuse_layout(layout)


def test_a_setting_that_is_switched_off_takes_its_details_along() -> None:
    settings = SamplerSettings().updated(
        num_steps=4, window=4, cache="dual", cache_refresh=2, remask="remdm", remask_rate=0.1
    )
    assert settings.updated(cache="none").cache_refresh is None
    assert settings.updated(remask=False).remask_rate is None
    assert settings.updated(remask="remdm_loop").remask_rate == 0.1
    assert SamplerSettings(remask=True).remask == "p2"
    assert SamplerSettings().updated(remask="none").remask is False
