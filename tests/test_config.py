"""Recipes and flags become settings; what is unknown or of the wrong type is reported by name."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.config import (
    ALIASES,
    as_yaml,
    coerce,
    parse_flags,
    read_recipe,
    recipe_names,
    resolve,
    resolve_own,
    take_flag,
    training_hints,
)
from decausal.errors import UserError
from decausal.training.settings import ConversionSettings
from decausal.training.settings.pretraining import PretrainSettings
from decausal.verbs import answers
from tests.runs import ROOT

HINTS = get_type_hints(ConversionSettings)
words = st.from_regex(r"[a-zA-Z_/][a-zA-Z0-9_/.\-]{0,12}", fullmatch=True).filter(
    lambda word: word.lower() not in ("none", "null", "true", "false", "yes", "no", "on", "off")
)
NUMBERS = {int: st.integers(2, 10**6), float: st.floats(0.001, 0.9), bool: st.booleans(), str: words}
SAMPLERS = st.fixed_dictionaries({}, optional={"threshold": st.floats(0.001, 0.9), "top_k": st.integers(2, 10**6)})


def values_of(hint):
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if hint is dict:
        return SAMPLERS
    if hint in NUMBERS:
        return NUMBERS[hint]
    if get_origin(hint) is tuple:
        return st.lists(values_of(get_args(hint)[0]), min_size=2, max_size=4).map(tuple)
    return st.one_of(*(st.none() if option is type(None) else values_of(option) for option in get_args(hint)))


# Settings whose values are refused in some combinations.
BOUND_TOGETHER = {
    *("views", "complementary_masks", "layout", "block_size", "causal_context", "noise_per"),
    *(f"{loss}_{end}_step" for loss in ConversionSettings.losses() for end in ("start", "stop")),
    *("kl_top_k", "kl_tail_bucket", "causal_kl_weight", "rows", "warm_start_steps", "eval_split"),
}
conversions = st.fixed_dictionaries(
    {}, optional={name: values_of(hint) for name, hint in HINTS.items() if name not in BOUND_TOGETHER}
).map(lambda values: ConversionSettings(**values))


def as_flag(value) -> str:
    return (
        ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if value is None else str(value)
    )


@given(conversions)
@settings(max_examples=30, deadline=None)
def test_settings_survive_being_printed_as_yaml_and_read_as_a_recipe(conversion):
    recipe = yaml.safe_load(as_yaml(conversion, {"learning_rate": 1e-5, "output_dir": "out"}))
    assert resolve(ConversionSettings, recipe, []) == (conversion, {"learning_rate": 1e-5, "output_dir": "out"})


@given(conversions)
@settings(max_examples=30, deadline=None)
def test_settings_survive_being_written_as_flags(conversion):
    set_values = {name: value for name, value in asdict(conversion).items() if value is not None}
    flags = [part for name, value in set_values.items() for part in (f"--{name}", as_flag(value))]
    assert resolve(ConversionSettings, {}, flags)[0] == conversion
    assert (
        resolve(ConversionSettings, {}, [f"--{name}={as_flag(value)}" for name, value in set_values.items()])[0]
        == conversion
    )


@given(st.sampled_from(sorted(HINTS)), st.data())
@settings(max_examples=100, deadline=None)
def test_reading_a_value_twice_changes_nothing(name, data):
    value = data.draw(values_of(HINTS[name]))
    once = coerce(value, HINTS[name], name)
    assert once == value
    assert type(once) is type(value)
    assert coerce(once, HINTS[name], name) == once


@given(st.text(max_size=12), st.sampled_from(sorted(training_hints())))
@settings(max_examples=150, deadline=None)
def test_any_text_is_read_or_refused_in_one_line(text, name):
    reported = ""
    try:
        coerce(text, training_hints()[name], f"flag --{name}")
    except UserError as error:
        reported = str(error)
    assert reported == "" or reported.startswith(f"flag --{name}: ")


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("learning_rate", "3e-4", 3e-4),
        ("warmup_steps", "0.05", 0.05),
        ("bf16", "yes", True),
        ("lr_scheduler_kwargs", '{"num_decay_steps": 5}', {"num_decay_steps": 5}),
        ("lr_scheduler_kwargs", "{min_lr: 1e-5}", {"min_lr": 1e-5}),
        ("lr_scheduler_type", "cosine", "cosine"),
        ("save_strategy", "epoch", "epoch"),
        ("eval_steps", "0.1", 0.1),
        ("save_total_limit", "none", None),
        ("report_to", "wandb,tensorboard", ["wandb", "tensorboard"]),
        ("report_to", "[wandb]", ["wandb"]),
        ("report_to", "tensorboard", "tensorboard"),
        ("fsdp", "full_shard auto_wrap", "full_shard auto_wrap"),
    ],
)
def test_training_arguments_are_read_as_transformers_users_write_them(name, given, expected):
    assert resolve(ConversionSettings, {}, [f"--{name}", given])[1] == {name: expected}


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (["--max_steps", "abc"], "flag --max_steps: 'abc' is not accepted; give a whole number"),
        (["--max_steps", "1.5"], "'1.5' is not accepted; give a whole number"),
        (["--shift", "2"], "flag --shift: '2' is not accepted; give one of 0, 1"),
        (["--weighting", "1/t"], "give one of none, inverse_t"),
        (["--bf16", "perhaps"], "give true or false"),
        (["--learning_rate", "fast"], "give a number"),
        (["--lr_scheduler_type", "cosinus"], "'cosinus' is not accepted; give one of linear, cosine"),
        (["--eval_strategy", "sometimes"], "give one of no, steps, epoch"),
        (["--parallelism_config", "2"], "flag --parallelism_config: '2' is not accepted; give none"),
        (["--data"], "flag --data needs a value"),
        (["--max_steps", "--bf16"], "flag --max_steps needs a value: give a whole number"),
        (["--lerning_rate", "1"], "unknown key 'lerning_rate' (flag); did you mean 'learning_rate'?"),
        (["--align_wieght", "1"], "did you mean 'align_weight'?"),
        (["--zzzzzz", "1"], "unknown key 'zzzzzz' (flag)"),
        (["text.txt"], "'text.txt' is not a flag"),
        (["--"], "'--' is not a flag"),
        (["--align_stop_step", "soon"], "give a whole number"),
        (["--kl_divergence", "kl"], "give one of forward_kl, reverse_kl, jsd"),
        (["--layout", "blocks"], "give one of causal, bidirectional, block"),
    ],
)
def test_bad_flags_are_reported_by_name(flags, reported):
    with pytest.raises(UserError, match=re.escape(reported)):
        resolve(ConversionSettings, {}, flags)[0].with_facts()


def test_an_unknown_key_of_a_recipe_names_the_recipe_and_the_nearest_key():
    with pytest.raises(
        UserError, match=r"unknown key 'algn_weight' \(recipe my\.yaml\); did you mean 'align_weight'\?"
    ):
        resolve(ConversionSettings, {"algn_weight": 1}, [], where="recipe my.yaml")
    with pytest.raises(UserError, match=r"recipe my\.yaml: views: 'two' is not accepted; give a whole number"):
        resolve(ConversionSettings, {"views": "two"}, [], where="recipe my.yaml")


def test_flags_win_over_the_recipe_and_aliases_over_neither():
    recipe = {"align_weight": 10.0, "learning_rate": 1e-4, "views": 2}
    conversion, training = resolve(ConversionSettings, recipe, ["--alignment_weight", "3", "--learning-rate=0.5"])
    assert (conversion.align_weight, conversion.views, training) == (3.0, 2, {"learning_rate": 0.5})


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_stands_for_a_setting(alias):
    assert ALIASES[alias] in HINTS
    assert alias not in HINTS


def test_a_bare_flag_is_true_and_a_bare_resume_means_the_latest_checkpoint():
    conversion, training = resolve(ConversionSettings, {}, ["--overwrite", "--bf16", "--resume_from_checkpoint"])
    assert conversion.overwrite is True
    assert training == {"bf16": True, "resume_from_checkpoint": "true"}


def test_flags_are_taken_out_and_the_others_stay_what_they_were():
    flags = ["--bf16", "--recipe", "mdm", "--data=a=b"]
    rest, value = take_flag(flags, "recipe", "repr-align")
    assert value == "mdm"
    assert parse_flags(rest) == {"bf16": True, "data": "a=b"}
    assert take_flag(rest, "recipe", "repr-align") == (rest, "repr-align")


def test_verbs_without_training_arguments_take_none():
    assert resolve_own(PretrainSettings, ["--vocab_size", "300"]).vocab_size == 300
    with pytest.raises(UserError, match=r"unknown flag --vocab_sise; did you mean 'vocab_size'\?"):
        resolve_own(PretrainSettings, ["--vocab_sise", "300"])


# Recipes


def test_the_recipes_that_the_documents_promise_are_there():
    assert {"mdm", "repr-align", "diffullama", "bd3lm", "sdar", "fast-dllm-v2"} <= set(recipe_names())
    readme = (ROOT / "README.md").read_text()
    assert set(recipe_names()) <= set(re.findall(r"`([a-z0-9\-]+)`", readme))
    papers = (ROOT / "docs" / "papers.md").read_text()
    assert set(recipe_names()) - {"fine-tune"} <= set(re.findall(r"(?:`|--recipe )([a-z0-9\-]+)", papers))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves(name):
    conversion, training = resolve(ConversionSettings, read_recipe(name), [])
    conversion = conversion.with_facts()
    assert conversion.layout in ("bidirectional", "block")
    assert set(training) <= set(training_hints())


def test_recipes_are_the_methods_they_are_named_after():
    conversions = {name: resolve(ConversionSettings, read_recipe(name), [])[0] for name in recipe_names()}
    assert conversions["mdm"].align_weight == 0
    assert conversions["repr-align"].align_weight > 0
    assert {conversions["fine-tune"].layout, conversions["fine-tune"].block_size, conversions["fine-tune"].shift} == {
        None
    }
    assert conversions["fine-tune"].align_weight == conversions["fine-tune"].kl_weight == 0
    assert (conversions["diffullama"].weighting, conversions["diffullama"].shift) == ("inverse_t", 1)
    assert conversions["diffullama"].anneal_steps > 0
    blocks = {name: conversions[name] for name in ("bd3lm", "sdar", "fast-dllm-v2")}
    assert all(conversion.layout == "block" for conversion in blocks.values())
    assert {name: conversion.shift for name, conversion in blocks.items()} == {"bd3lm": 0, "sdar": 0, "fast-dllm-v2": 1}
    assert (blocks["bd3lm"].weighting, blocks["bd3lm"].noise_per) == ("inverse_t", "block")
    assert (blocks["sdar"].block_size, blocks["sdar"].weighting) == (4, "inverse_t")
    assert (blocks["fast-dllm-v2"].views, blocks["fast-dllm-v2"].complementary_masks) == (2, True)


def test_recipes_of_papers_differ_from_ours_in_what_the_documents_say():
    def stated(name):
        return {key: value for key, value in read_recipe(name).items() if key != "lr_scheduler_kwargs"}

    def changes(name):
        ours, theirs = stated(name), stated(f"{name}-paper")
        return {key: theirs.get(key) for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}

    assert changes("repr-align") == {
        **{"align_weight": 10.0, "align_schedule": "constant", "papl": 1.0, "freeze_embeddings": True},
        **{"stratified_noise": False, "max_length": 4096, "warmup_steps": 0.001},
        "lr_scheduler_type": "cosine_with_min_lr",
    }
    assert read_recipe("repr-align-paper")["lr_scheduler_kwargs"] == {"min_lr": 3e-6}
    defaults = {"states_per_rollout": 1}
    facts = {"shift": 0, "causal_context": None}
    rates = {"learning_rate": 1e-5, "warmup_steps": 5}
    assert changes("opdlm") == {**rates, "rollout_curriculum": 100, **facts, **defaults}


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("- a\n- b\n", "must hold 'key: value' lines"),
        ("a: [1, 2\n", "is not YAML"),
        ("", "must hold 'key: value' lines"),
        (b"\xff\xfe\x00", "is not text"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, reported):
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=reported):
        read_recipe(str(path))


def test_an_unknown_recipe_names_the_nearest_and_all():
    with pytest.raises(UserError, match=r"unknown recipe 'repr_align'; did you mean 'repr-align'\?.*mdm"):
        read_recipe("repr_align")
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        read_recipe("nowhere.yaml")


# Documents


def test_the_page_on_converting_names_every_recipe_and_no_unknown_setting():
    page = (ROOT / "docs" / "convert.md").read_text()
    others = {action.dest for action in answers._parser()._actions}
    assert set(recipe_names()) <= set(re.findall(r"`([a-z0-9\-]+)`", page))
    unknown = {
        name for name in re.findall(r"`--([a-z0-9_]+)", page) if name not in HINTS and name not in training_hints()
    }
    assert unknown - others <= {"recipe", "goal", "gpu", "print_config"}


def test_help_texts_are_there_for_every_setting():
    for settings_type in (ConversionSettings, PretrainSettings):
        assert all(field.metadata["help"] for field in fields(settings_type))


def test_the_name_of_a_file_is_one_name_even_with_a_comma(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b.jsonl").write_text("")
    assert resolve(ConversionSettings, {}, ["--data", "a, b.jsonl"])[0].data == "a, b.jsonl"
    assert resolve(ConversionSettings, {}, ["--data", "a,b.jsonl"])[0].data == ("a", "b.jsonl")
