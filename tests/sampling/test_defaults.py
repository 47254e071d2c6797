"""Sampler settings that are stored with a model: how they get there, what they do, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decausal.config import resolve
from decausal.errors import UserError
from decausal.models.checkpoint import Converted
from decausal.sampling.generate import generate
from decausal.sampling.model import DiffusionModel, load
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.settings.of_model import settings_for
from decausal.training.settings import ConversionSettings
from decausal.verbs.flags import VerbParser
from decausal.verbs.sampling import add_sampling_flags, sampler_options
from tests.runs import run, save_source, write_text
from tests.sampling.stand_ins import conversion_facts
from tests.sampling.tiny_models import converted


def settings_of(flags: list[str]) -> dict[str, Any] | None:
    settings, _ = resolve(ConversionSettings, {}, ["--data", "x", *flags])
    return settings.sampler


def test_a_conversion_stores_settings_that_its_model_then_samples_by(tmp_path: Path) -> None:
    sampler = {"window": 3, "num_steps": 5, "cache": "dual"}
    text = write_text(tmp_path / "text.jsonl")
    run(save_source(tmp_path / "source"), text, tmp_path / "out", sampler=sampler)
    model = load(tmp_path / "out")
    assert model.facts.sampler == sampler
    without = DiffusionModel(Converted(model.model, model.tokenizer, replace(model.facts, sampler={})))
    assert model.generate("the rain", max_new_tokens=8) == without.generate("the rain", max_new_tokens=8, **sampler)


@pytest.mark.parametrize("written", ["{window: 32, cache: dual}", '{"window": 32, "cache": "dual"}'])
def test_the_flag_takes_yaml_and_json(written: str) -> None:
    assert settings_of(["--sampler", written]) == {"window": 32, "cache": "dual"}
    assert settings_of([]) is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sampler", "{windw: 3}"], "did you mean 'window'"),
        (["--sampler", "{window: 0}"], "window=0 is not accepted"),
        (["--sampler", "{1: 2}"], "1 is not the name of a setting"),
        (["--sampler", "{cache: dual}"], "needs window"),
        (["--sampler", "window"], "--sampler"),
        (
            ["--sampler", "{window: 4}", "--layout", "block", "--block_size", "4"],
            "--sampler: window is not possible under layout 'block'",
        ),
    ],
)
def test_a_conversion_refuses_settings_that_its_model_cannot_honour(flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        settings_of(flags)


def test_a_call_goes_over_what_is_stored_and_that_over_the_defaults() -> None:
    facts = conversion_facts(5, sampler={"window": 8, "threshold": 0.7, "cache": "dual", "cache_refresh": 4})
    assert settings_for(facts) == SamplerSettings(window=8, threshold=0.7, cache="dual", cache_refresh=4)
    found = settings_for(facts, num_steps=6, cache="none")
    assert found == SamplerSettings(window=8, num_steps=6)
    assert settings_for(facts, speculative=True) == SamplerSettings(speculative=True)


def test_settings_in_effect_are_those_that_do_something_beside_each_other() -> None:
    denoising, verifying = SamplerSettings(num_steps=4).in_effect(), SamplerSettings(speculative=True).in_effect()
    assert {"num_steps", "confidence", "window", "remask"} <= denoising.keys() - verifying.keys()
    assert {"draft", "draft_length", "verifier"} <= verifying.keys() - denoising.keys()
    assert {"temperature", "speculative", "max_new_tokens"} <= denoising.keys() & verifying.keys()
    assert "cache_refresh" in SamplerSettings(window=8, cache="dual").in_effect().keys() - denoising.keys()


@pytest.mark.parametrize(
    "options", [{"num_steps": 4}, {"threshold": 0.7}, {"entropy_bound": 0.1}, {"confidence": "margin"}]
)
def test_verified_decoding_refuses_settings_of_denoising_steps(options: dict[str, Any]) -> None:
    facts = conversion_facts(5, layout="block", block_size=4, sampler={"speculative": True})
    (name,) = options
    with pytest.raises(UserError, match=rf"^{name} does nothing in speculative decoding"):
        settings_for(facts, **options)
    assert settings_for(facts, speculative=False, **options) == SamplerSettings(**options)
    stored = conversion_facts(5, layout="block", block_size=4, sampler=options)
    assert settings_for(stored, speculative=True) == SamplerSettings(speculative=True)


def test_what_the_facts_hold_amiss_is_reported_with_the_file() -> None:
    with pytest.raises(UserError, match=r"^decausal\.json, 'sampler': unknown sampler setting 'windw'"):
        settings_for(conversion_facts(5, sampler={"windw": 8}))
    with pytest.raises(UserError, match=r"^decausal\.json, 'sampler': window is not possible under layout 'block'"):
        settings_for(conversion_facts(5, layout="block", block_size=4, sampler={"window": 8}))


@pytest.mark.parametrize(
    ("facts", "options"),
    [
        ({"layout": "block", "block_size": 4}, {"window": 4}),
        ({"layout": "block", "block_size": 4}, {"guidance": 1.0}),
        ({"layout": "block", "block_size": 4}, {"remask": "remdm", "num_steps": 4}),
        ({"layout": "causal"}, {"order": "random", "num_steps": 4}),
        ({"layout": "causal"}, {"remask": True}),
        ({"layout": "block", "block_size": 4, "shift": 0}, {"first_token_from_clean": True}),
        ({"layout": "bidirectional"}, {"first_token_from_clean": True}),
        ({"layout": "causal"}, {"first_token_from_clean": True}),
    ],
)
def test_generate_refuses_what_the_layout_cannot_honour(facts: dict[str, Any], options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"is not possible under layout '{facts['layout']}'"):
        generate(converted(**facts), "import", max_new_tokens=4, **options)


@pytest.mark.parametrize("given", [{"window": 4}, {"first_token_from_clean": True}])
def test_speculation_and_settings_of_denoising_exclude_each_other(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(given))} does nothing in speculative decoding"):
        SamplerSettings().updated(**given, speculative=True)


def test_speculation_leaves_out_what_is_stored_for_denoising_blocks() -> None:
    facts = conversion_facts(5, layout="block", block_size=4, shift=1, sampler={"first_token_from_clean": True})
    assert settings_for(facts, speculative=True) == SamplerSettings(speculative=True)


def test_a_stage_with_another_shift_does_not_inherit_what_needs_it() -> None:
    settings, _ = resolve(ConversionSettings, {}, ["--data", "x", "--shift", "0"])
    sampler = {"first_token_from_clean": True, "threshold": 0.7}
    assert settings.with_facts("block", 4, False, 1, sampler=sampler).sampler == {"threshold": 0.7}
    settings, _ = resolve(ConversionSettings, {}, ["--data", "x"])
    assert settings.with_facts("block", 4, False, 1, sampler=sampler).sampler == sampler


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--remask"], {"remask": "p2"}),
        (["--remasking", "remdm", "--remask_rate", "0.1"], {"remask": "remdm", "remask_rate": 0.1}),
        (["--remasking", "none"], {"remask": "none"}),
        (
            ["--window", "8", "--cache", "prefix", "--cache_refresh", "4"],
            {"window": 8, "cache": "prefix", "cache_refresh": 4},
        ),
        (["--order", "random", "--guidance", "1.5"], {"order": "random", "guidance": 1.5}),
        (["--first_token_from_clean"], {"first_token_from_clean": True}),
        (["--no-first_token_from_clean"], {"first_token_from_clean": False}),
    ],
)
def test_every_flag_is_the_setting_of_its_name(flags: list[str], options: dict[str, Any]) -> None:
    parser = VerbParser("generate", "")
    add_sampling_flags(parser)
    assert sampler_options(parser.parse_args(flags)) == options


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["dir", "--chat", "a", "b"], ["a", "b"]),
        (["--chat", "dir", "a", "--seed", "3", "b"], ["a", "b"]),
        (["dir", "a", "--chat", "--", "-b", "--c"], ["a", "-b", "--c"]),
        (["dir", "--chat"], []),
    ],
    ids=str,
)
def test_flags_stand_before_between_and_behind_texts(arguments: list[str], texts: list[str]) -> None:
    parser = VerbParser("generate", "")
    parser.add_argument("directory")
    parser.add_argument("prompts", nargs="*")
    parser.add_argument("--chat", action="store_true")
    add_sampling_flags(parser)
    flags = parser.parse_args(arguments)
    assert (flags.directory, flags.prompts, flags.chat) == ("dir", texts, True)
    with pytest.raises(UserError, match="unrecognized arguments: --sed;"):
        parser.parse_args(["dir", "--sed", "3", "a"])
