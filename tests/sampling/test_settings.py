"""Settings: names, aliases, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from decausal.errors import UserError
from decausal.sampling.settings import ALIASES, SamplerSettings, canonical


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0),
        ("num_steps", 2.5),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("threshold", 0.0),
        ("threshold", 1.5),
        ("confidence", "certainty"),
        ("seed", -1),
        ("seed", "one"),
        ("remask", "yes"),
        ("seed", None),
        ("entropy_bound", -0.1),
        ("entropy_bound", float("inf")),
        ("stop", ""),
        ("stop", ["\n", ""]),
        ("stop", 7),
    ],
)
def test_values_out_of_range_are_refused_by_name_on_one_line(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^{name}=.* is not accepted: it must be [^\n]+$"):
        SamplerSettings().updated(**{name: value})


@pytest.mark.parametrize(
    "schedules",
    [
        {"num_steps": 4, "threshold": 0.5},
        {"num_steps": 4, "entropy_bound": 1.0},
        {"threshold": 0.5, "entropy_bound": 1.0},
    ],
)
def test_two_schedules_are_refused(schedules: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=" and ".join(f"{name}={value}" for name, value in schedules.items())):
        SamplerSettings(**schedules)


def test_without_a_schedule_the_threshold_is_used() -> None:
    assert SamplerSettings().threshold == 0.9
    assert SamplerSettings().num_steps is None


def test_a_schedule_replaces_the_others() -> None:
    schedules = {"num_steps": 4, "threshold": 0.5, "entropy_bound": 1.0}
    for first, first_value in schedules.items():
        for second, second_value in schedules.items():
            settings = SamplerSettings(**{first: first_value}).updated(**{second: second_value})
            assert settings.schedule == second
            assert {name: getattr(settings, name) for name in schedules} == dict.fromkeys(schedules) | {
                second: second_value
            }


def test_stop_texts_are_one_or_several() -> None:
    assert SamplerSettings().updated(stop="x").stop == ("x",)
    assert SamplerSettings(stop=("x",)).updated(stop=["y", "z"]).stop == ("y", "z")
    assert SamplerSettings(stop=("x",)).updated(stop=None).stop == ()


def test_an_entropy_bound_goes_with_no_remasking() -> None:
    with pytest.raises(UserError, match="remask and entropy_bound exclude each other"):
        SamplerSettings(entropy_bound=1.0, remask=True)


def test_an_option_left_none_changes_no_schedule() -> None:
    assert SamplerSettings(num_steps=4).updated(threshold=None) == SamplerSettings(num_steps=4)


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_aliases_mean_our_names(alias: str) -> None:
    assert canonical({alias: 1}) == {ALIASES[alias]: 1}


def test_a_setting_under_two_names_is_refused() -> None:
    with pytest.raises(UserError, match="num_steps is given twice"):
        SamplerSettings().updated(steps=4, num_steps=4)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'temprature'; did you mean 'temperature'"):
        SamplerSettings().updated(temprature=1.0)


def test_integers_are_taken_for_real_numbers() -> None:
    settings = SamplerSettings().updated(temperature=1, threshold=1, top_p=1)
    assert [settings.temperature, settings.threshold, settings.top_p] == [1.0, 1.0, 1.0]
