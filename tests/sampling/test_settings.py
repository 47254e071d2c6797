"""Settings: names, aliases, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.drawing import uniform_numbers
from decausal.sampling.generate import generate
from decausal.sampling.settings import ALIASES, SETTINGS, WHOLE_ROWS, SamplerSettings, canonical, names_for
from decausal.serving.schema import CompletionBody
from decausal.verbs.flags import VerbParser
from decausal.verbs.sampling import add_sampling_flags
from tests.sampling.tiny_models import converted

COUNTS = ("max_new_tokens", "num_steps", "top_k", "window", "cache_refresh")
REALS = ("threshold", "entropy_bound", "temperature", "top_p", "min_p", "guidance", "remask_rate")


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
        ("seed", 1.5),
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


@pytest.mark.parametrize("value", [2**31, 2**63, 2**64, 10**5000], ids=["2^31", "2^63", "2^64", "10^5000"])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_that_no_engine_could_compute_with_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"^{name}=.* is not accepted: it must be [^\n]+ below 2\*\*31$") as refused:
        SamplerSettings().updated(**{name: value})
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e-40, 9e-21, 1.1e20, 1e39, 1e308, 10**400], ids=str)
@pytest.mark.parametrize("name", REALS)
def test_reals_that_float32_does_not_hold_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{name}=.* is not accepted: it must be [^\n]+ to (1|1e\+20|1e\+06)$"):
        SamplerSettings().updated(**{name: value})


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**62, 2**64 - 1, 10**300])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert SamplerSettings(seed=seed).seed == seed % 2**62
    row_after_the_last = uniform_numbers(torch.tensor([2**62]), 3, torch.tensor([5]))
    assert torch.equal(row_after_the_last, uniform_numbers(torch.tensor([0]), 3, torch.tensor([5])))


@pytest.fixture(scope="module")
def models() -> dict[str, Converted]:
    return {"bidirectional": converted(), "block": converted(layout="block", block_size=4)}


STATIC = {"num_steps": 3}
DRAWN = {"num_steps": 3, "temperature": 1.0}
LOOPED = {"num_steps": 4, "remask": "remdm", "temperature": 1.0}
SAME = [
    ({**STATIC, "temperature": 1e-20}, STATIC),
    ({**DRAWN, "top_p": 1e-20}, STATIC),
    ({**DRAWN, "min_p": 1e-20}, DRAWN),
    ({**DRAWN, "top_k": 2**31 - 1}, DRAWN),
    ({"num_steps": 2**31 - 1}, {"num_steps": 8}),
    ({"threshold": 1e-20}, {"num_steps": 1}),
    ({"entropy_bound": 1e-20}, {"entropy_bound": 0.0}),
    ({"entropy_bound": 1e20}, {"num_steps": 1}),
    ({**STATIC, "guidance": 1e-20}, STATIC),
    ({**STATIC, "window": 2**31 - 1}, STATIC),
    ({**STATIC, "window": 4, "cache": "dual", "cache_refresh": 2**31 - 1}, {**STATIC, "window": 4, "cache": "dual"}),
    ({**LOOPED, "remask_rate": 1e-20}, {**LOOPED, "remask": False}),
]


@pytest.mark.parametrize(("extreme", "plain"), SAME, ids=str)
def test_the_last_values_that_are_accepted_do_what_they_say(
    models: dict[str, Converted], extreme: dict[str, Any], plain: dict[str, Any]
) -> None:
    layouts = ["bidirectional"] if set(extreme) & set(names_for(WHOLE_ROWS)) else ["bidirectional", "block"]
    for layout in layouts:
        found, wanted = (generate(models[layout], "import", max_new_tokens=8, **each) for each in (extreme, plain))
        assert found.ids == wanted.ids, layout


@pytest.mark.parametrize("options", [{"temperature": 1e20}, {"guidance": 1e6, "temperature": 1e-20}], ids=str)
def test_the_largest_values_still_leave_numbers_that_are_finite(
    models: dict[str, Converted], options: dict[str, Any]
) -> None:
    written = generate(models["bidirectional"], ["import", "x"], max_new_tokens=24, num_steps=4, **options)
    for row in written:  # where a distribution is no number, the first token is taken
        assert len(set(row.ids)) > 6
        assert models["bidirectional"].facts.mask_token_id not in row.ids


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


def test_every_setting_is_a_field_of_requests_and_has_its_flags() -> None:
    parser = VerbParser("generate", "")
    add_sampling_flags(parser)
    flags = set(vars(parser.parse_args([])))
    for name, setting in SETTINGS.items():
        assert name in CompletionBody.model_fields or name == "max_new_tokens", name  # OpenAI's max_tokens
        assert (name in flags) == bool(setting.flags), name
